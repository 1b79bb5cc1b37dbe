# SPDX-License-Identifier: Apache-2.0
"""A logarithmic grid of n steps an octave: of 8 bits, for averages.

The word of a positive float32 is its logarithm: 2^23 (log2 x + 127), exactly at
powers of two and linearly between them. Positions are counted from the word 0:

    position = word n / 2^23 = base + code - 1,  code = 1 ... top;  0 is zero.

``n`` is the largest of eight sizes an octave with which ``top`` codes reach
from the smallest value of the block to the largest. As it is whole, a block has
the same codes when it is multiplied by a power of two. And as the grid does not
begin at the block's own ends, a stored value is on it in the next step as well,
while all values shrink by 1 - b2 and the ends with them: what is rounded is
only what the average moves by, a small part of a code, and with it goes most of
the noise. Of sixteen codes that would be a bad use; they have ``_log``.

Rounded stochastically, the mean is right in the word, which between two powers
of two is the mean of the value.
"""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp

from optax_mp.formats import _log

_OCTAVE = 23  # bits of a word
_MOST = 512  # steps an octave: the product with 23 bits has 32
# A grid is a word a block: the octave of base, its step in it, and n; that is 0
# where a block is not finite.
_BITS = 10
# Positions are rounded to this part of a step: more than float32 adds to them,
# so that a stored value is exactly on the grid.
_PARTS = 2048.0


@dataclasses.dataclass(frozen=True)
class Octaves:
  """Positions on the grid are in steps from ``base``; zero is at -1."""

  top: int
  even: bool = True  # a second moment does not answer to its rounding

  def fit(self, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The grid of each block, uint32, without the axes."""
    low, high, finite = _log.ends(x, axes)
    low = jnp.maximum(low, _log.NORMAL)
    span = jnp.maximum(high - low, 1).astype(jnp.float32)
    # Both ends are rounded outwards: two steps fewer than there are codes.
    n = _whole((self.top - 2) * 2.0**_OCTAVE / span)
    low = low.astype(jnp.uint32)
    octave = low >> _OCTAVE
    step = ((low & (_log.NORMAL - 1)) * n) >> _OCTAVE
    return _pack(octave, step, jnp.where(finite, n, 0))

  def relative(self, x: jax.Array, grid: jax.Array) -> jax.Array:
    """Steps from ``base``."""
    words = _log.words_of(x)
    octave, step, n = _unpack(grid, words >> 31)
    above = (words - (octave << _OCTAVE)).astype(jnp.float32)
    steps = above * (n * 2.0**-_OCTAVE) - step
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
    octave, step, n = _unpack(grid, (position + 1).astype(jnp.int32) >> 8)
    above = jnp.round((position + step) * (2.0**_OCTAVE / n))
    words = (octave << _OCTAVE) + above.astype(jnp.int32)
    return _log.value_of(words, position, n > 0)


def _whole(n: jax.Array) -> jax.Array:
  """The next smaller whole number of 4 significant bits, uint32."""
  words = _log.words_of(jnp.clip(n, 1.0, _MOST)) & -(2 ** (_OCTAVE - 3))
  return lax.bitcast_convert_type(words, jnp.float32).astype(jnp.uint32)


def _pack(octave: jax.Array, step: jax.Array, n: jax.Array) -> jax.Array:
  return (octave << (2 * _BITS)) | (step << _BITS) | n


def _unpack(
  grid: jax.Array, zero: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Octave, step and n of a grid.

  Args:
    grid: for each value.
    zero: a zero for each value, of which XLA does not know that it is one. It
      would unpack before it broadcasts, and on a TPU each array of a number a
      block is padded to half a byte a value.

  Returns:
    int32, and float32 twice.
  """
  grid = grid + zero.astype(jnp.uint32)
  octave = (grid >> (2 * _BITS)).astype(jnp.int32)
  step = (grid >> _BITS) & (2**_BITS - 1)
  n = grid & (2**_BITS - 1)
  return octave, step.astype(jnp.float32), n.astype(jnp.float32)
