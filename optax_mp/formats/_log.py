# SPDX-License-Identifier: Apache-2.0
"""A logarithmic grid from the smallest to the largest value of a block: 4 bits.

    log = high - step (top - code),    code = 1 ... top;    code 0 is zero.

``high`` is the largest value of the block, rounded up, and with ``step`` the
first code is the smallest one, rounded down: what an average moves by in a step
is less than any rounding, and beyond the codes it would be cut off. Both are
exact to a thousandth of an octave: by what they are rounded outwards blocks
reach further in the next step of an optimizer, and their steps grow. What is
more than 15 octaves below the largest has the code 1. For more codes see
``_octaves``.

Rounded stochastically, the mean is right in the logarithm. Between values that
are an octave apart, the mean of the values would say nothing of the mean of
their inverse roots, by which Adam multiplies.

Multiplied by a power of two, a block has the same codes.
"""

import dataclasses

import jax
import jax.numpy as jnp

from optax_mp.formats import _grids
from optax_mp.formats import _logarithms
from optax_mp.formats import _reductions

# A block's grid is one word: 18 bits for the logarithm of the largest value, in
# units of 2^-10 octaves; and 14 bits for the number of units from there down to
# the smallest value. These 14 are all ones in a marked block. An average with a
# decay of 0.999 falls by one and a half units per step.
_SPAN_BITS = 14
_OCTAVES = 15  # of the codes of a block at most
_DROPPED = 23 - 10
_EXACT = 64  # what is so little off has been on the grid, and stays there
_MARK = 2**_SPAN_BITS - 1  # 16 octaves; no other span is as large


@dataclasses.dataclass(frozen=True)
class Log(_logarithms.Logarithms):
  """Positions on the grid are in steps from code 1."""

  def fit(self, x: jax.Array, over: _reductions.Over) -> jax.Array:
    """The grid of each block, uint32, without the axes."""
    low, high, marked = _logarithms.ends(x, over, _OCTAVES)
    low, high = map(_logarithms.logarithm, (low, high))
    span = jnp.maximum(_round_up(high) - _round_down(low), 0)
    span = jnp.where(marked, _MARK, span)
    # In a marked block the last codes are not for numbers.
    codes = (self.top - _grids.last(self)) / (self.top - 1)
    above = round(codes * _MARK * 2**_DROPPED)
    # Code 1 is at or above the smallest number there: a negative logarithm
    # would hide the mark, which `unpack` gives as a sign.
    least = (_MARK << _DROPPED) + _logarithms.NORMAL
    most = _logarithms.EXPONENTS - 2**_DROPPED - above  # or it would wrap
    wider = jnp.maximum(jnp.minimum(high, most) + above, least)
    high = jnp.where(marked, wider, high)
    high = _round_up(high)
    return ((high << _SPAN_BITS) | span).astype(jnp.uint32)

  def unpack(
    self, grid: jax.Array, zero: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    grid = grid + zero.astype(jnp.uint32)
    span = (grid & _MARK).astype(jnp.int32)
    first = ((grid >> _SPAN_BITS).astype(jnp.int32) - span) << _DROPPED
    # One more than all ones has the bit that becomes the sign.
    marked = ((span + 1) << (31 - _SPAN_BITS)) & _logarithms.SIGN
    step = jnp.maximum(span, 1).astype(jnp.float32)
    step *= 2**_DROPPED / (self.top - 1)
    return first | marked, step


def _round_up(log: jax.Array) -> jax.Array:
  """18 of the 31 bits of a logarithm, but not up to infinity."""
  log = jnp.minimum(log, _logarithms.EXPONENTS - 2**_DROPPED)
  return (log + 2**_DROPPED - _EXACT) >> _DROPPED


def _round_down(log: jax.Array) -> jax.Array:
  return (log + _EXACT) >> _DROPPED
