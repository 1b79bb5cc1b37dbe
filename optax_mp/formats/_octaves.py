# SPDX-License-Identifier: Apache-2.0
"""A logarithmic grid of n steps an octave: of 8 bits, for averages.

From the octave of the smallest value of a block, its power of two, the grid
goes up in equal steps of the logarithm:

    log = octave + 2^23 / n (code - 1),    code = 1 ... top;    code 0 is zero.

``n`` is the largest of eight sizes an octave with which the codes reach the
largest value; what is more than 40 octaves smaller has the code 1. It is a
whole number, so all grids of one n are parts of the same one: a block has the
same codes when it is multiplied by a power of two, and a stored value is still
on the grid in the next step, when all values have shrunk by 1 - b2 and the ends
with them. What is rounded is only what the average moves by, a small part of a
code, and most of the noise is gone. Of sixteen codes this would be a bad use;
they have ``_log``.
"""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from optax_mp.formats import _grids
from optax_mp.formats import _logarithms
from optax_mp.formats import _reductions
from optax_mp.formats import _rounding

_MOST = 512  # steps an octave
_OCTAVES = 40  # of the codes of a block at most, six steps each
# A grid is a word a block: the octave's and, in its 23 bits that are free, the
# step, from 2^14 to 2^23, as a float32 without its last 4 bits.
_STEP_DROPPED = 4
_STEP_BIAS = (127 + 14) << 23
_MARK = np.uint32(2**31)


@dataclasses.dataclass(frozen=True)
class Octaves(_logarithms.Logarithms):
  """Positions on the grid are in steps from the octave."""

  def fit(self, x: jax.Array, over: _reductions.Over) -> jax.Array:
    """The grid of each block, uint32, without the axes; a sign bit marks it."""
    low, high, marked = _logarithms.ends(x, over, _OCTAVES)
    octave = low & _logarithms.EXPONENTS
    # Its logarithm is above the largest word by a twelfth of an octave or less.
    span = (high - octave).astype(jnp.float32) + _logarithms.OCTAVE / 12
    # The last code is the largest value, rounded up.
    last = jnp.where(marked, _grids.last(self), self.top).astype(jnp.float32)
    n = _whole((last - 1) * _logarithms.OCTAVE / span)
    step = _logarithms.words_of(_logarithms.OCTAVE / n) - _STEP_BIAS
    grid = octave | _rounding.round_nearest(step, _STEP_DROPPED)
    grid = lax.bitcast_convert_type(grid, jnp.uint32)
    return jnp.where(marked, grid | _MARK, grid)

  def unpack(
    self, grid: jax.Array, zero: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    # No conversion: XLA:GPU would keep what it makes of a number a block.
    grid = grid + zero.astype(jnp.uint32)
    grid = lax.bitcast_convert_type(grid, jnp.int32)
    octave = grid & (_logarithms.SIGN | _logarithms.EXPONENTS)
    step = ((grid & (_logarithms.OCTAVE - 1)) << _STEP_DROPPED) + _STEP_BIAS
    step = lax.bitcast_convert_type(step, jnp.float32)
    return octave, step


def _whole(n: jax.Array) -> jax.Array:
  """The next smaller whole number of 4 significant bits, as a float32."""
  words = _logarithms.words_of(jnp.clip(n, 1.0, _MOST))
  words &= -(_logarithms.OCTAVE >> 3)
  return jnp.floor(lax.bitcast_convert_type(words, jnp.float32))
