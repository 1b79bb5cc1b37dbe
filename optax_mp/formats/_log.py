# SPDX-License-Identifier: Apache-2.0
"""A logarithmic grid from the smallest to the largest value of a block: 4 bits.

The word of a positive float32 is its logarithm: 2^23 (log2 x + 127), exactly at
powers of two and linearly between them. So a grid of equal steps in the word is
one of equal ratios in the value, and needs no logarithm:

    word = low + step (code - 1),    code = 1 ... top;    code 0 is zero.

``low`` is the smallest value of the block and with ``step`` the last code is
the largest, both to nearest. Were the ends rounded outwards the block would
reach further in the next step of an optimizer, and with sixteen codes, each as
large as an octave, its steps would grow again. For more codes see ``_octaves``.

Rounded stochastically, the mean is right in the word. Between values that are
an octave apart, the mean of the values would say nothing of the mean of their
inverse roots, by which Adam multiplies.

Multiplied by a power of two, a block has the same codes.
"""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp

from optax_mp.formats import _blocks
from optax_mp.formats import _rounding

NORMAL = 0x00800000  # the word of the smallest normal number
LARGEST = 0x7F7FFFFF
_NAN = 0x7FC00000
# A grid is a word a block: ``low`` without its last 11 bits, then ``step`` as a
# float of 5 bits of exponent and 7 of mantissa, all ones where not finite.
_LOW_BITS, _STEP_BITS = 20, 12
_STEP_MANTISSA = 7
_DROPPED = 31 - _LOW_BITS
_NOT_FINITE = 2**_STEP_BITS - 1


@dataclasses.dataclass(frozen=True)
class Log:
  """Positions on the grid are in steps from ``low``; zero is at -1."""

  top: int
  even: bool = True  # a second moment does not answer to its rounding

  def fit(self, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The grid of each block, uint32, without the axes."""
    low, high, finite = ends(x, axes)
    low = _round_low(low)
    span = jnp.maximum(high - (low << _DROPPED), 0)
    step = _round_step(span.astype(jnp.float32) / (self.top - 1))
    grid = (low << _STEP_BITS) | jnp.where(finite, step, _NOT_FINITE)
    return grid.astype(jnp.uint32)

  def relative(self, x: jax.Array, grid: jax.Array) -> jax.Array:
    """Steps from ``low``."""
    words = words_of(x)
    low, step = _unpack(grid, words >> 31)
    steps = (words - low).astype(jnp.float32) / step
    steps = jnp.clip(steps, 0.0, self.top - 1)
    return jnp.where(words < NORMAL, -1.0, steps)

  def below(self, position: jax.Array, grid: jax.Array) -> jax.Array:
    """The last code before a position."""
    del grid
    return jnp.floor(position).astype(jnp.int32) + 1

  def value(self, code: jax.Array, grid: jax.Array) -> jax.Array:
    """The position of a code."""
    del grid
    return (code - 1).astype(jnp.float32)

  def absolute(self, position: jax.Array, grid: jax.Array) -> jax.Array:
    """The value at a position; NaN in a block that is not finite."""
    low, step = _unpack(grid, (position + 1).astype(jnp.int32) >> 8)
    words = low + jnp.round(position * step).astype(jnp.int32)
    return value_of(words, position, step < 2.0**31)


def words_of(x: jax.Array) -> jax.Array:
  """The words of floats, as integers that have a sign."""
  return lax.bitcast_convert_type(x, jnp.int32)


def ends(
  x: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Words of the smallest and the largest, and whether all are finite.

  Of values that are not zero; where all are, both ends are 0. One selection and
  two reductions: XLA:GPU recomputes little for the second of two kernels, and
  keeps the rest as temporaries.
  """
  high = _blocks.largest(x, axes)
  low = _blocks.smallest(jnp.where(x == 0, jnp.inf, x), axes)
  finite = (high < jnp.inf) & (low >= 0)  # False with a NaN
  return words_of(jnp.minimum(low, high)), words_of(high), finite


def value_of(
  words: jax.Array, position: jax.Array, finite: jax.Array
) -> jax.Array:
  """The floats of words; 0 before the first position, else not."""
  words = jnp.where(words > LARGEST, LARGEST, words)
  words = jnp.where(position < 0, 0, jnp.maximum(words, NORMAL))
  words = jnp.where(finite, words, _NAN)
  return lax.bitcast_convert_type(words, jnp.float32)


def _round_low(low: jax.Array) -> jax.Array:
  """The word of the smallest value to nearest, 13 significant bits."""
  words = jnp.clip(low, 0, LARGEST - 2**_DROPPED)
  return (words + 2 ** (_DROPPED - 1)) >> _DROPPED


def _round_step(step: jax.Array) -> jax.Array:
  """A step of 1 to 2^30 words to nearest, 8 significant bits."""
  bits = words_of(jnp.maximum(step, 1.0))
  return ((bits + 0x8000) >> 16) - (127 << 7)


def _unpack(grid: jax.Array, zero: jax.Array) -> tuple[jax.Array, jax.Array]:
  """``low`` and ``step``; of step, 2^31 or more says that it is not finite.

  Args:
    grid: for each value.
    zero: a zero for each value, of which XLA does not know that it is one. It
      would unpack before it broadcasts, and on a TPU each array of a number a
      block is padded to half a byte a value.

  Returns:
    A word, int32, and a number of words, float32.
  """
  grid = grid + zero.astype(jnp.uint32)
  low = (grid >> _STEP_BITS).astype(jnp.int32) << _DROPPED
  step = ((grid & _NOT_FINITE) << 16) + jnp.uint32(127 << 23)
  return low, _rounding.from_bits(step)
