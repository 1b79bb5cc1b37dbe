# SPDX-License-Identifier: Apache-2.0
"""What both logarithmic grids do: logarithms of float32, and codes of them.

The word of a positive float32 is 2^23 (log2 x + 127) at powers of two, and
linear between them: its slope, relative to x, doubles within an octave. With
sqrt(3 m - 2) in place of the mantissa m, both from 1 to 2, the slope is that of
a logarithm within 6 %. That matters to averages: they fall by equal ratios, and
the draws of stochastic rounding, which are even over steps, are right in the
mean only if equal ratios are equally many steps of a grid.
"""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp

from optax_mp.formats import _ends
from optax_mp.formats import _grids
from optax_mp.formats import _reductions
from optax_mp.formats import _rounding

OCTAVE = 2**23
EXPONENTS = 0x7F800000  # the words of powers of two have no other bits
SIGN = -(2**31)
_ONE = 0x3F800000
NORMAL = 0x00800000  # the word of the smallest normal number
_LARGEST = 0x7F7FFFFF


@dataclasses.dataclass(frozen=True)
class Logarithms:
  """A grid of equal steps of the logarithm; positions count them.

  Code 1 is at position 0; zero is code 0, at -1.
  """

  top: int
  even: bool = True  # a second moment hardly answers to its rounding
  signed: bool = False

  @property
  def infinity(self) -> int:
    return self.top

  @property
  def reach(self) -> float:
    return self.top - 1

  def unpack(
    self, grid: jax.Array, zero: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """The logarithm at position 0 and the length of a step.

    The logarithm has the sign bit set in a marked block.

    Args:
      grid: for each value, uint32.
      zero: a zero for each value that is a number, of which XLA does not know
        that it is one. It would unpack before it broadcasts, and on a TPU each
        array of a number a block is padded to half a byte a value.

    Returns:
      int32 and float32.
    """
    raise NotImplementedError

  def scaled(self, x: jax.Array, grid: jax.Array) -> _grids.Relative:
    """The position of x, which may lie between two codes."""
    words = words_of(x)
    first, step = self.unpack(grid, words >> 31)
    marked, first = first < 0, first & ~SIGN
    steps = (logarithm(words) - first).astype(jnp.float32) / step
    position = jnp.clip(steps, 0.0, self.top)
    return jnp.where(_rounding.is_zero(x), -1.0, position), marked

  def below(self, position: jax.Array, grid: jax.Array) -> jax.Array:
    """The last code before a position."""
    del grid
    return jnp.floor(position).astype(jnp.int32) + 1

  def value(self, code: jax.Array, grid: jax.Array) -> jax.Array:
    """The position of a code."""
    del grid
    return (code - 1).astype(jnp.float32)

  def unscaled(self, position: jax.Array, grid: jax.Array) -> _grids.Relative:
    """The value at a position."""
    first, step = self.unpack(grid, words_of(position + 1) >> 31)
    # Up to the largest number: beyond it the sign of a mark would be lost.
    beyond = _LARGEST - (first & ~SIGN)
    steps = jnp.minimum((position * step).astype(jnp.int32), beyond)
    value = exponential(first + steps)
    return jnp.where(position < 0, 0.0, jnp.abs(value)), value


def words_of(x: jax.Array) -> jax.Array:
  """The words of floats, as integers that have a sign."""
  return lax.bitcast_convert_type(x, jnp.int32)


def logarithm(words: jax.Array) -> jax.Array:
  """2^23 (log2 x + 127), nearly, of the words of positive normal numbers."""
  root = words_of(jnp.sqrt(3 * _mantissa(words) - 2))
  return (words & EXPONENTS) + root - _ONE


def exponential(log: jax.Array) -> jax.Array:
  """The inverse of :func:`logarithm`, a float; of the same sign."""
  root = _mantissa(log)
  octave = lax.bitcast_convert_type(log & (SIGN | EXPONENTS), jnp.float32)
  return octave * ((root * root + 2) * (1 / 3))


def _mantissa(words: jax.Array) -> jax.Array:
  """From 1 to 2."""
  mantissa = (words & (OCTAVE - 1)) | _ONE
  return lax.bitcast_convert_type(mantissa, jnp.float32)


def ends(x: jax.Array, over: _reductions.Over, octaves: int) -> _ends.Ends:
  """Each block's ends as words, and whether it is marked.

  Both are the word of the smallest normal number in a block of zeros. The lower
  end is not more than ``octaves`` below the upper one: the second moment of a
  weight whose gradients have ended falls without end, and would leave few codes
  to the other values of its block.
  """
  low, high, marked = _ends.range_of(x, over, signed=False)
  low, high = (
    jnp.maximum(words_of(x), NORMAL) for x in (jnp.minimum(low, high), high)
  )
  return _ends.Ends(jnp.maximum(low, high - octaves * OCTAVE), high, marked)
