# SPDX-License-Identifier: Apache-2.0
"""Equal steps from the smallest to the largest value of a block."""

import dataclasses
import math
from typing import Any, Literal

import chex
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from optax_mp.formats import _base
from optax_mp.formats import _block_int
from optax_mp.formats import _blocks
from optax_mp.formats import _ends
from optax_mp.formats import _groups
from optax_mp.formats import _reductions

# The values of a marked block's last codes, from the last one on.
_SPECIAL = (np.inf, -np.inf, np.nan)
_LEAST = 2.0**-100  # a range that is large enough for a step


@dataclasses.dataclass(frozen=True)
class Affine:
  r"""Keeps an array in 4- or 8-bit integers between the ends of each block.

  **Stored:** ``Block(codes, (low, high))``: 1/2 or 1 byte per value, and 4
  bytes a block, 8 with ``stats_dtype='float32'``. With lo and hi the smallest
  and the largest value of a block and N the largest code,

  .. math::
    s = (hi - lo) / N, \qquad
    \mathrm{encode}(x) = \lfloor (x - lo) / s + 1/2 \rfloor, \qquad
    \mathrm{decode} = lo + \mathrm{code} \cdot s

  A block of equal values has s = 0 and codes 0. For errors, gradients and
  whatever is not spread around zero; it is MicroAdam's format of errors.

  Args:
    bits: 4 or 8.
    block_size: values of a block, along the last axis. An array of one axis has
      a shorter last block; one of more axes whose last two are no multiples of
      (8, ``block_size``) has lo and hi a row.
    stats_dtype: of lo and hi; bfloat16 ones are rounded outwards, so that no
      value is beyond them.

  Raises:
    ValueError: for other bits, a block of fewer than two values, or another
      dtype.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from optax_mp import formats
    >>> x = 5 + jax.random.normal(jax.random.key(0), (256, 256))
    >>> for format in (formats.Affine(), formats.BlockInt(4)):
    ...   error = format.decode(format.encode(x), x) - x
    ...   print(f'{formats.bits_per_value(format, x.shape)} {error.std():.3f}')
    4.5 0.090
    4.25 0.504

  **Caveats:** zero has no code unless all of a block is zero. Beside other
  values it decodes to another number, and x and -x may decode to different
  magnitudes. Optimizers use ratios and signs of moments, so ``compressed``
  refuses this format for fields called ``mu``, ``nu``, ``m1`` or ``m2``.
  Infinities and NaNs come back as they are and do not widen the range; their
  block has three codes fewer, and stores ``lo`` above ``hi`` as its mark.
  Magnitudes above 2^48 beside smaller ones do not widen the range either: such
  values come back as the nearer end of the range. Blocks with a range below
  2^-122 (2^-118 in 8 bits) are stored as their smallest value. Magnitudes below
  2^-126 count as 0, and magnitudes above 2^126 as 2^126.

  References:
    Modoranu et al., `MicroAdam: Accurate Adaptive Optimization with Low Space
    Overhead and Provable Convergence <https://arxiv.org/abs/2405.15593>`_, 2024
  """

  exact_zero = False  # a zero beside other values comes back as another one

  bits: Literal[4, 8] = 4
  block_size: int = 64
  stats_dtype: Literal['bfloat16', 'float32'] = 'bfloat16'

  def __post_init__(self):
    _base.check_choice(self.bits, 'bits', (4, 8))
    _base.check_choice(self.stats_dtype, 'stats_dtype', ('bfloat16', 'float32'))
    _groups.check_block_size(self.block_size)

  def fit(self, x: chex.Array) -> tuple[jax.Array, jax.Array]:
    """Lo and hi of each block."""
    x = jnp.asarray(x, jnp.float32)
    whole = self._whole(x.shape)
    if whole is None:
      return self._ends(x)
    last = (jnp.reshape(end, 1) for end in self._ends(x[whole:]))
    pairs = zip(self._ends(x[:whole]), last, strict=True)
    low, high = map(jnp.concatenate, pairs)
    return low, high

  def encode(
    self, x: chex.Array, key: chex.PRNGKey | None = None, scales: Any = None
  ) -> _block_int.Block:
    """Rounds ``x`` to codes; with the ends of ``fit``, if there are any yet."""
    del key
    x = jnp.asarray(x, jnp.float32)
    scales = self.fit(x) if scales is None else scales
    low, step, marked = self._grid(scales, x.shape)
    code = jnp.floor((x - low) / jnp.where(step > 0, step, 1.0) + 0.5)
    code = jnp.clip(code, 0, self._top - jnp.where(marked, len(_SPECIAL), 0.0))
    code = jnp.where(step > 0, code, 0.0).astype(jnp.int32)
    for down, value in enumerate(_SPECIAL):
      same = x != x if np.isnan(value) else x == value
      code = jnp.where(marked & same, self._top - down, code)
    code += self._lowest
    return _block_int.Block(code.astype(self._dtype), scales)

  def decode(
    self, stored: _block_int.Block, like: jax.ShapeDtypeStruct
  ) -> chex.Array:
    """Gives the codes' values, in the dtype of ``like``."""
    low, step, marked = self._grid(stored.scales, like.shape)
    code = jnp.asarray(stored.codes, jnp.int32) - self._lowest
    x = low + code.astype(jnp.float32) * step
    for down, value in enumerate(_SPECIAL):
      x = jnp.where(marked & (code == self._top - down), value, x)
    return x.astype(like.dtype)

  def note(self, shape: tuple[int, ...]) -> str:
    """A remark on arrays of this shape, which the plan shows."""
    whole = len(shape) == 1
    return '' if whole else _blocks.why_rows(shape, self.block_size)

  @property
  def _top(self) -> int:
    return 2**self.bits - 1

  @property
  def _lowest(self) -> int:
    """The stored number of code 0. Orbax can save int4, so 4 bits are int4."""
    return -8 if self.bits == 4 else 0

  @property
  def _dtype(self) -> str:
    return 'int4' if self.bits == 4 else 'uint8'

  def _whole(self, shape: tuple[int, ...]) -> int | None:
    """How many values are in whole blocks, if the last one is shorter."""
    whole = math.prod(shape) // self.block_size * self.block_size
    return whole if len(shape) == 1 and 0 < whole < shape[0] else None

  def _ends(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    cut = _blocks.cut(x.shape, self.block_size)
    low, high, marked = _ends.both(x, _reductions.Over(cut.axes, cut.split))
    # Neither the range nor the end below a marked one may become infinite.
    low, high = (jnp.clip(end, -(2.0**126), 2.0**126) for end in (low, high))
    if self.stats_dtype == 'bfloat16':
      low, high = -_rounded_up(-low), _rounded_up(high)
    # A marked block is one with lo above hi, so its ends must differ.
    below = (low - jnp.maximum(jnp.abs(low) * 2.0**-7, _LEAST)).astype(
      low.dtype
    )
    below = jnp.where(low < high, low, below)
    low, high = jnp.where(marked, high, low), jnp.where(marked, below, high)
    return cut.kept(low, x), cut.kept(high, x)

  def _expand(self, end: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The end of a block, for each of its values."""
    end, whole = end.astype(jnp.float32), self._whole(shape)
    if whole is None:
      return _blocks.cut(shape, self.block_size).expand(end)
    first = _blocks.cut((whole,), self.block_size).expand(end[:-1])
    last = jnp.broadcast_to(end[-1:], shape[0] - whole)
    return jnp.concatenate([first, last])

  def _grid(self, scales: Any, shape: tuple[int, ...]):
    """The offset and the step for each value, and whether its block is marked.

    The step has so few bits that a code times it is exact: else decoded values
    would depend on whether a compiler fuses product and sum.
    """
    low, high = (self._expand(end, shape) for end in scales)
    marked = low > high
    low, high = jnp.minimum(low, high), jnp.maximum(low, high)
    top = self._top - np.arange(2) * len(_SPECIAL)
    step = (high - low) * jnp.where(marked, *np.float32(1 / top[::-1]))
    half = 1 << (self.bits - 1)
    word = lax.bitcast_convert_type(step, jnp.int32) + half
    word &= -2 * half
    return low, lax.bitcast_convert_type(word, jnp.float32), marked


def _rounded_up(x: jax.Array) -> jax.Array:
  """To bfloat16, towards infinity but not to it."""
  word = lax.bitcast_convert_type(x, jnp.uint32)
  above = jnp.minimum(word + 0xFFFF, 0x7F7FFFFF)
  word = jnp.where(x > 0, above, word) >> 16
  return lax.bitcast_convert_type(word.astype(jnp.uint16), jnp.bfloat16)
