# SPDX-License-Identifier: Apache-2.0
"""fp8 with a scale a block, and COAT's dynamic range expansion."""

import dataclasses
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from optax_mp.formats import _base
from optax_mp.formats import _block_int
from optax_mp.formats import _blocks
from optax_mp.formats import _fp8
from optax_mp.formats import _grids
from optax_mp.formats import _groups
from optax_mp.formats import _maps


@dataclasses.dataclass(frozen=True)
class Float8:
  r"""Keeps an array in 8-bit floats, with a scale a block.

  **Stored:** ``Block(codes, scales)``: 1 byte per value, 4 bytes a block. With
  M the largest magnitude of a block, m the smallest that is not zero, and F the
  largest number of the dtype (448 or 57344),

  .. math::
    \mathrm{code} = \mathrm{fp8}\left(F\, (x / M)^k\right), \qquad
    \mathrm{decode} = M\, (\mathrm{code} / F)^{1/k}, \qquad
    k = \frac{1}{16} \left\lfloor 16\,
      \frac{\log_2 (F^2 / 2)}{\log_2 (M / m)} \right\rfloor,

  so that the range of the dtype is spent on the range of the block: COAT's
  dynamic range expansion, in which its geometric centre cancels. Without
  ``expand``, k = 1. The power is that of the float32 word, whose logarithm is
  linear between powers of two; what is rounded is x, not its power.

  Args:
    dtype: 'e4m3', 3 bits of mantissa, or 'e5m2', 2.
    block_size: values of a block; see :class:`BlockInt` for odd shapes.
    expand: whether to expand.
    rounding: 'nearest' or 'stochastic' (needs a key).
    keep_nonzero: whether values that are not zero never become zero. Pass False
      for first moments without ``expand``. Otherwise they become at least 4e-6
      ('e5m2': 3e-10) of the largest of their block, and Adam may divide them by
      the root of a much smaller second moment.
    signed: False for second moments and other arrays that are not negative. A
      negative value then comes back as NaN, and a value beside smaller ones
      counts as an overflow above 2^96 instead of 2^48.

  Raises:
    ValueError: for other arguments; in ``encode``, where a key is missing.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from optax_mp import formats
    >>> x = jax.random.normal(jax.random.key(0), (256, 256))
    >>> for expand in (False, True):
    ...   format = formats.Float8('e4m3', expand=expand)
    ...   error = format.decode(format.encode(x), x) - x
    ...   print(f'{error.std():.3f}')
    0.026
    0.015

  **Caveats:** M is rounded up to a bfloat16, and k is at least 1/2 and at most
  255/16: a value more than F^4 / 4 times smaller than the largest of its block
  gets the smallest code, and does not limit the expansion of the others.
  Nothing is ever out of the dtype's range, where a cast would give NaN.
  Overflows are decoded as in :class:`BlockInt`. With ``expand``, k is 1/2 in a
  block that has an infinity or a NaN; with ``signed=False`` also in one that
  has a value above 2^96.

  References:
    Xi et al., `COAT: Compressing Optimizer states and Activation for
    Memory-Efficient FP8 Training <https://arxiv.org/abs/2410.19313>`_, 2024
  """

  dtype: Literal['e4m3', 'e5m2'] = 'e4m3'
  block_size: int = 128
  expand: bool = True
  rounding: Literal['nearest', 'stochastic'] = 'nearest'
  keep_nonzero: bool = True
  signed: bool = True

  def __post_init__(self):
    _base.check_choice(self.dtype, 'dtype', ('e4m3', 'e5m2'))
    _groups.check_block_size(self.block_size)
    _base.check_rounding(self)

  @property
  def relative(self) -> bool:
    """Errors are in proportion to values."""
    return True

  @property
  def without_signs(self) -> 'Float8':
    """The same for values that are not negative."""
    return dataclasses.replace(self, signed=False)

  def fit(self, x: chex.Array) -> jax.Array:
    """The scales that ``encode`` would store."""
    return _groups.fit(self._grid(), self._groups(x.shape), x)

  def encode(
    self,
    x: chex.Array,
    key: chex.PRNGKey | None = None,
    scales: Any = None,
  ) -> _block_int.Block:
    """Rounds ``x`` to codes; with scales of ``fit``, if there are any yet."""
    noise = None if self.rounding == 'nearest' else _base.check_key(key, self)
    x = jnp.asarray(x, jnp.float32)
    scales = self.fit(x) if scales is None else scales
    wide = self._groups(x.shape).expand(scales)
    code = _grids.round_to(self._grid(), x, wide, noise, self.keep_nonzero)
    number = self._numbers.number(code)
    if self.signed:
      number = jnp.where(x < 0, -number, number)
    # Exact: a number of the dtype already. A cast of bits would cost a TPU a
    # copy, as its tiles of floats and of integers differ.
    return _block_int.Block(number.astype(self._dtype), scales)

  def decode(
    self, stored: _block_int.Block, like: jax.ShapeDtypeStruct
  ) -> chex.Array:
    """Gives the codes' values, in the dtype of ``like``."""
    wide = self._groups(like.shape).expand(stored.scales)
    number = stored.codes.astype(jnp.float32)
    size = jnp.abs(number)
    fraction = self._numbers.fraction(size)
    if self.expand:
      fraction = _fp8.contract(fraction, wide)
    grid = self._grid()
    value, sign = grid.unscaled(fraction, wide)
    value = _grids.special(grid, value, sign, size, self._numbers.normal)
    return jnp.where(number < 0, -value, value).astype(like.dtype)

  def note(self, shape: tuple[int, ...]) -> str:
    """A remark on arrays of this shape, which the plan shows."""
    return _blocks.why_rows(shape, self.block_size)

  @property
  def _dtype(self) -> Any:
    names = {'e4m3': jnp.float8_e4m3fn, 'e5m2': jnp.float8_e5m2}
    return names[self.dtype]

  @property
  def _numbers(self) -> _fp8.Numbers:
    return _fp8.E4M3 if self.dtype == 'e4m3' else _fp8.E5M2

  def _grid(self) -> _grids.Grid:
    if self.expand:
      return _fp8.Expanded(self._numbers, self.signed)
    return _maps.Scaled(self._numbers, self.signed)

  def _groups(self, shape: tuple[int, ...]) -> _blocks.Blocks:
    return _blocks.cut(shape, self.block_size)
