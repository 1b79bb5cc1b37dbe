# SPDX-License-Identifier: Apache-2.0
"""A logarithmic grid between the smallest and the largest value of a block.

The word of a positive float32 is its logarithm: 2^23 (log2 x + 127), exactly at
powers of two and linearly between them. So a grid of equal steps in the word is
one of equal ratios in the value, and needs no logarithm:

    word = step (base + code - 1),    code = 1 ... top;    code 0 is zero.

``step`` is the smallest of eight sizes an octave that reaches from the smallest
value of the block to the largest. The grid is anchored at the word 0 and not at
the block: as long as the ratio of the two stays within an eighth of an octave,
stored values stay grid points, whatever the maximum does, and what is rounded
is only what an average moves in a step.

Multiplied by a power of two, a block has the same codes.
"""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp

from optax_mp.formats import _blocks
from optax_mp.formats import _rounding

_NORMAL = 0x00800000  # the word of the smallest normal number
_LARGEST = 0x7F7FFFFF
_NAN = 0x7FC00000
_FREE = 0xFF  # the bits of a grid that hold nothing
_NOT_FINITE = 0xFF  # in place of a size


@dataclasses.dataclass(frozen=True)
class Log:
  """The grid as one word a block: size of the step, base, 8 bits unused."""

  top: int
  even: bool = True  # a second moment does not answer to its rounding

  def fit(self, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The grid of each block, uint32, without the axes.

    One selection and two reductions: XLA:GPU recomputes little for the second
    of two kernels, and keeps the rest as temporaries.
    """
    high = _blocks.largest(x, axes)
    low = _blocks.smallest(jnp.where(x == 0, jnp.inf, x), axes)
    finite = (high < jnp.inf) & (low >= 0)  # False with a NaN
    return jnp.where(finite, self._between(low, high), _not_finite())

  def _between(self, low: jax.Array, high: jax.Array) -> jax.Array:
    low, high = (lax.bitcast_convert_type(x, jnp.int32) for x in (low, high))
    low = jnp.maximum(jnp.minimum(low, high), _NORMAL)
    # As both ends are rounded to the grid, it has two steps fewer than codes.
    span = jnp.maximum(high - low, 0).astype(jnp.float32)
    size = _smallest_size(span / (self.top - 2))
    return _pack(size, lax.div(low, _step(size)))

  def relative(self, x: jax.Array, grid: jax.Array) -> jax.Array:
    """The value itself: the grid is absolute."""
    del grid
    return x

  def below(self, x: jax.Array, grid: jax.Array) -> jax.Array:
    """The largest code whose value is at most x."""
    words = lax.bitcast_convert_type(x, jnp.int32)
    step, base = _unpack(grid, words)
    steps = (words - base * step).astype(jnp.float32) / step.astype(jnp.float32)
    code = jnp.floor(steps).astype(jnp.int32) + 1
    return jnp.where(words < _NORMAL, 0, code)

  def value(self, code: jax.Array, grid: jax.Array) -> jax.Array:
    """The float32 of a code; NaN in a block that is not finite."""
    step, base = _unpack(grid, code)
    words = jnp.maximum(step * (base + code - 1), _NORMAL)
    words = jnp.where(words > _LARGEST, _LARGEST, words)
    words = jnp.where(code > 0, words, 0)
    words = jnp.where(step == 0, _NAN, words)
    return lax.bitcast_convert_type(words, jnp.float32)

  def absolute(self, value: jax.Array, grid: jax.Array) -> jax.Array:
    """The value itself."""
    del grid
    return value


def _pack(size: jax.Array, base: jax.Array) -> jax.Array:
  return ((size << 24) | (base << 8)).astype(jnp.uint32)


def _not_finite() -> jax.Array:
  return jnp.uint32(_NOT_FINITE) << 24


def _unpack(grid: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Step and base; ``other`` is any number a value, its low bits are free.

  Were it not for them, XLA would unpack before it broadcasts, and on a TPU each
  array of a number a block is padded to half a byte a value.
  """
  word = grid + (other & _FREE).astype(jnp.uint32)
  size, base = word >> 24, (word >> 8) & 0xFFFF
  return _step(size.astype(jnp.int32)), base.astype(jnp.int32)


def _step(size: jax.Array) -> jax.Array:
  """The words of a step: (8 + size mod 8) 2^(12 + size div 8).

  From 2^-8 octaves; 0 for the size 0xFF, which shifts all bits out.
  """
  return (8 + (size & 7)) << (12 + (size >> 3))


def _smallest_size(step: jax.Array) -> jax.Array:
  """The size of a step, rounded up; a float32 has the same form."""
  bits = _rounding.to_bits(jnp.maximum(step, 2.0**15)).astype(jnp.int32)
  return ((bits + 0xFFFFF) >> 20) - ((127 + 15) << 3)
