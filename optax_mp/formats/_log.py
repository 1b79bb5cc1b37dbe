# SPDX-License-Identifier: Apache-2.0
"""A logarithmic grid from the smallest to the largest value of a block: 4 bits.

    log = high - step (top - code),    code = 1 ... top;    code 0 is zero.

``high`` is the largest value of the block: were it further from the last code,
what an average rises by would be cut off. With ``step`` the first code is the
smallest value, both to nearest. Were the ends rounded outwards the block would
reach further in the next step of an optimizer, and with sixteen codes, each as
large as an octave, its steps would grow again. What is more than 20 octaves
below the largest has the code 1. For more codes see ``_octaves``.

Rounded stochastically, the mean is right in the logarithm. Between values that
are an octave apart, the mean of the values would say nothing of the mean of
their inverse roots, by which Adam multiplies.

Multiplied by a power of two, a block has the same codes.
"""

import dataclasses

import jax
import jax.numpy as jnp

from optax_mp.formats import _logarithms
from optax_mp.formats import _rounding

# A grid is a word a block: ``high`` without its last 11 bits, then ``step``, a
# float of 5 bits of exponent and 7 of mantissa, all ones where not finite.
_HIGH_BITS, _STEP_BITS = 20, 12
_OCTAVES = 20  # of the codes of a block at most
_DROPPED = 31 - _HIGH_BITS
_NOT_FINITE = 2**_STEP_BITS - 1


@dataclasses.dataclass(frozen=True)
class Log(_logarithms.Logarithms):
  """Positions on the grid are in steps from code 1."""

  def fit(self, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The grid of each block, uint32, without the axes."""
    low, high, finite = _logarithms.ends(x, axes, _OCTAVES)
    low, high = map(_logarithms.logarithm, (low, high))
    high = _round_high(high)
    span = jnp.maximum((high << _DROPPED) - low, 0)
    step = _round_step(span.astype(jnp.float32) / (self.top - 1))
    grid = (high << _STEP_BITS) | jnp.where(finite, step, _NOT_FINITE)
    return grid.astype(jnp.uint32)

  def unpack(
    self, grid: jax.Array, zero: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    grid = grid + zero.astype(jnp.uint32)
    high = (grid >> _STEP_BITS).astype(jnp.int32) << _DROPPED
    step = ((grid & _NOT_FINITE) << 16) + jnp.uint32(127 << 23)
    step = _rounding.from_bits(step)
    first = high - (step * (self.top - 1)).astype(jnp.int32)
    return first, step, (grid & _NOT_FINITE) < _NOT_FINITE


def _round_high(high: jax.Array) -> jax.Array:
  """A logarithm to nearest, 20 of its 31 bits, but not up to infinity."""
  high = jnp.minimum(high, _logarithms.EXPONENTS - 2**_DROPPED)
  return (high + 2 ** (_DROPPED - 1)) >> _DROPPED


def _round_step(step: jax.Array) -> jax.Array:
  """A step of 1 to 2^30 to nearest, 8 significant bits."""
  bits = _logarithms.words_of(jnp.maximum(step, 1.0))
  return ((bits + 0x8000) >> 16) - (127 << 7)
