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

from optax_mp.formats import _blocks
from optax_mp.formats import _rounding

OCTAVE = 2**23
EXPONENTS = 0x7F800000  # the words of powers of two have no other bits
_ONE = 0x3F800000
_NORMAL = 0x00800000  # the word of the smallest normal number
_LARGEST = 0x7F7FFFFF


@dataclasses.dataclass(frozen=True)
class Logarithms:
  """A grid of equal steps of the logarithm; positions count them.

  Code 1 is at position 0; zero is code 0, at -1.
  """

  top: int
  even: bool = True  # a second moment hardly answers to its rounding

  def unpack(
    self, grid: jax.Array, zero: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The logarithm at position 0, the length of a step, whether finite.

    Args:
      grid: for each value, uint32.
      zero: a zero for each value, of which XLA does not know that it is one. It
        would unpack before it broadcasts, and on a TPU each array of a number a
        block is padded to half a byte a value.

    Returns:
      int32, float32 and bool.
    """
    raise NotImplementedError

  def scaled(self, x: jax.Array, grid: jax.Array) -> jax.Array:
    """The position of x, which may lie between two codes."""
    words = words_of(x)
    first, step, _ = self.unpack(grid, words >> 31)
    steps = (logarithm(words) - first).astype(jnp.float32) / step
    return jnp.where(
      _rounding.is_zero(x), -1.0, jnp.clip(steps, 0.0, self.top - 1)
    )

  def below(self, position: jax.Array, grid: jax.Array) -> jax.Array:
    """The last code before a position."""
    del grid
    return jnp.floor(position).astype(jnp.int32) + 1

  def value(self, code: jax.Array, grid: jax.Array) -> jax.Array:
    """The position of a code."""
    del grid
    return (code - 1).astype(jnp.float32)

  def unscaled(self, position: jax.Array, grid: jax.Array) -> jax.Array:
    """The value at a position; NaN in a block that is not finite."""
    first, step, finite = self.unpack(grid, words_of(position + 1) >> 31)
    log = first + (position * step).astype(jnp.int32)
    value = exponential(jnp.minimum(log, _LARGEST))
    value = jnp.where(position < 0, 0.0, value)
    return jnp.where(finite, value, jnp.nan)


def words_of(x: jax.Array) -> jax.Array:
  """The words of floats, as integers that have a sign."""
  return lax.bitcast_convert_type(x, jnp.int32)


def logarithm(words: jax.Array) -> jax.Array:
  """2^23 (log2 x + 127), nearly, of the words of positive normal numbers."""
  root = words_of(jnp.sqrt(3 * _mantissa(words) - 2))
  return (words & EXPONENTS) + root - _ONE


def exponential(log: jax.Array) -> jax.Array:
  """The inverse of :func:`logarithm`, a float."""
  root = _mantissa(log)
  octave = lax.bitcast_convert_type(log & EXPONENTS, jnp.float32)
  return octave * ((root * root + 2) * (1 / 3))


def _mantissa(words: jax.Array) -> jax.Array:
  """From 1 to 2."""
  mantissa = (words & (OCTAVE - 1)) | _ONE
  return lax.bitcast_convert_type(mantissa, jnp.float32)


def ends(
  x: jax.Array, axes: tuple[int, ...], octaves: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Words of the smallest and the largest, and whether all are finite.

  Of values that are not zero; where all are, both are that of the smallest
  number. The smallest is taken to be no more than some octaves below the
  largest: a value whose gradients have ended falls without end, and would take
  the codes of the others with it.

  One selection and two reductions: XLA:GPU recomputes little for the second of
  two kernels, and keeps the rest as temporaries.
  """
  high = _blocks.largest(x, axes)
  low = _blocks.smallest(jnp.where(_rounding.is_zero(x), jnp.inf, x), axes)
  finite = (high < jnp.inf) & (low >= 0)  # False with a NaN
  low, high = (
    jnp.maximum(words_of(x), _NORMAL) for x in (jnp.minimum(low, high), high)
  )
  return jnp.maximum(low, high - octaves * OCTAVE), high, finite
