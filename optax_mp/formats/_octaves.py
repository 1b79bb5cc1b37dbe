# SPDX-License-Identifier: Apache-2.0
"""A logarithmic grid of n steps an octave: of 8 bits, for averages.

The word of a positive float32 is its logarithm: 2^23 (log2 x + 127), exactly at
powers of two and linearly between them. From the octave of the smallest value
of a block, its power of two, the grid goes up in equal steps of the word:

    word = octave + 2^23 / n (code - 1),    code = 1 ... top;    code 0 is zero.

``n`` is the largest of eight sizes an octave with which the codes reach the
largest value. It is a whole number, so all grids of one n are parts of the same
one: a block has the same codes when it is multiplied by a power of two, and a
stored value is still on the grid in the next step, when all values have shrunk
by 1 - b2 and the ends with them. What is rounded is only what the average moves
by, a small part of a code, and most of the noise is gone. Of sixteen codes this
would be a bad use; they have ``_log``.

Rounded stochastically, the mean is right in the word, which between two powers
of two is the mean of the value.
"""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp

from optax_mp.formats import _log
from optax_mp.formats import _rounding

_OCTAVE = 2**23
_MOST = 512  # steps an octave
# A grid is a word a block: the octave's and, in 23 bits that it has free, the
# step, from 2^14 to 2^23, as a float32 without its last 4 bits.
_EXPONENTS = 0x7F800000
_STEP_DROPPED = 4
_STEP_BIAS = (127 + 14) << 23
# Positions are rounded to this part of a step: more than float32 adds to them,
# so that what was stored is exactly on the grid.
_PARTS = 2048.0


@dataclasses.dataclass(frozen=True)
class Octaves:
  """Positions on the grid are in steps from the octave; zero is at -1."""

  top: int
  even: bool = True  # a second moment does not answer to its rounding

  def fit(self, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The grid of each block, uint32, without the axes."""
    low, high, finite = _log.ends(x, axes)
    octave = jnp.maximum(low, _log.NORMAL) & _EXPONENTS
    span = jnp.maximum(high - octave, 1).astype(jnp.float32)
    # The last code is the largest value, rounded up.
    step = _OCTAVE / _whole((self.top - 1) * _OCTAVE / span)
    grid = octave | _rounding.round_nearest(
      _log.words_of(step) - _STEP_BIAS, _STEP_DROPPED
    )
    return jnp.where(finite, grid, _EXPONENTS).astype(jnp.uint32)

  def relative(self, x: jax.Array, grid: jax.Array) -> jax.Array:
    """Steps from the octave."""
    words = _log.words_of(x)
    octave, step = _unpack(grid, words >> 31)
    steps = (words - octave).astype(jnp.float32) / step
    steps = jnp.round(steps * _PARTS) / _PARTS
    steps = jnp.clip(steps, 0.0, self.top - 1)
    return jnp.where(words < _log.NORMAL, -1.0, steps)

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
    octave, step = _unpack(grid, (position + 1).astype(jnp.int32) >> 8)
    words = octave + jnp.round(position * step).astype(jnp.int32)
    return _log.value_of(words, position, octave < _EXPONENTS)


def _whole(n: jax.Array) -> jax.Array:
  """The next smaller whole number of 4 significant bits, as a float32."""
  words = _log.words_of(jnp.clip(n, 1.0, _MOST)) & -(_OCTAVE >> 3)
  return jnp.floor(lax.bitcast_convert_type(words, jnp.float32))


def _unpack(grid: jax.Array, zero: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The words of the octave, int32, and of a step, float32.

  Args:
    grid: for each value.
    zero: a zero for each value, of which XLA does not know that it is one. It
      would unpack before it broadcasts, and on a TPU each array of a number a
      block is padded to half a byte a value.

  Returns:
    Both, for each value.
  """
  grid = grid.astype(jnp.int32) + zero
  step = ((grid & (_OCTAVE - 1)) << _STEP_DROPPED) + _STEP_BIAS
  return grid & _EXPONENTS, lax.bitcast_convert_type(step, jnp.float32)
