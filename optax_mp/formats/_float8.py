# SPDX-License-Identifier: Apache-2.0
"""fp8 with a scale a block, and COAT's dynamic range expansion."""

import dataclasses
import math
from typing import Literal

import chex
import jax
from jax import lax
import jax.numpy as jnp

from optax_mp.formats import _base
from optax_mp.formats import _block_int
from optax_mp.formats import _blocks
from optax_mp.formats import _grids
from optax_mp.formats import _maps
from optax_mp.formats import _rounding

# Exponents of the expansion are multiples of 1/16, in 8 bits.
_SIXTEENTHS = 16.0
_SMALLEST, _LARGEST = 8, 255
_FREE = 0xFF


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
  ``expand``, k = 1. Rounding compares values after the expansion is undone.

  Args:
    dtype: 'e4m3', 3 bits of mantissa, or 'e5m2', 2.
    block_size: values of a block; see :class:`BlockInt` for odd shapes.
    expand: whether to expand.
    rounding: 'nearest' or 'stochastic' (needs a key).
    keep_nonzero: whether what is not zero never becomes zero.

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
    0.025
    0.014

  **Caveats:** M is rounded up to a bfloat16, and k is at least 1/2 and at most
  255/16: what is more than F^4 / 4 times smaller than its block's largest value
  becomes the smallest code instead of collapsing the expansion of the others.
  Nothing is ever out of the dtype's range, where a cast would give NaN. A NaN
  or an infinity makes NaN of its block.

  References:
    Xi et al., `COAT: Compressing Optimizer states and Activation for
    Memory-Efficient FP8 Training <https://arxiv.org/abs/2410.19313>`_, 2024
  """

  dtype: Literal['e4m3', 'e5m2'] = 'e4m3'
  block_size: int = 128
  expand: bool = True
  rounding: Literal['nearest', 'stochastic'] = 'nearest'
  keep_nonzero: bool = True

  def __post_init__(self):
    _base.check_choice(self.dtype, 'dtype', ('e4m3', 'e5m2'))
    _block_int.check_block_size(self.block_size)
    _base.check_rounding(self)

  @property
  def relative(self) -> bool:
    """Errors are in proportion to values."""
    return True

  def fit(self, x: chex.Array) -> jax.Array:
    """The scales that ``encode`` would store."""
    return _block_int.fit(self._grid(), self._groups(x.shape), x)

  def encode(
    self,
    x: chex.Array,
    key: chex.PRNGKey | None = None,
    scales: chex.Array | None = None,
  ) -> _block_int.Block:
    """Rounds ``x`` to codes; with scales of ``fit``, if there are any yet."""
    noise = None
    if self.rounding == 'stochastic':
      noise = _base.check_key(key, self)
    x = jnp.asarray(x, jnp.float32)
    scales = self.fit(x) if scales is None else scales
    wide = self._groups(x.shape).expand(scales)
    code = _grids.round_to(self._grid(), x, wide, noise, self.keep_nonzero)
    bits = (code + jnp.where(x < 0, 0x80, 0)).astype(jnp.uint8)
    return _block_int.Block(lax.bitcast_convert_type(bits, self._dtype), scales)

  def decode(
    self, stored: _block_int.Block, like: jax.ShapeDtypeStruct
  ) -> chex.Array:
    """Gives the codes' values, in the dtype of ``like``."""
    wide = self._groups(like.shape).expand(stored.scales)
    bits = lax.bitcast_convert_type(stored.codes, jnp.uint8).astype(jnp.int32)
    value = _grids.value_of(self._grid(), bits & 0x7F, wide)
    return jnp.where(bits >= 0x80, -value, value).astype(like.dtype)

  def note(self, shape: tuple[int, ...]) -> str:
    """What is special about an array of this shape; shown by the plan."""
    return _blocks.why_rows(shape, self.block_size)

  @property
  def _dtype(self):
    names = {'e4m3': jnp.float8_e4m3fn, 'e5m2': jnp.float8_e5m2}
    return names[self.dtype]

  def _grid(self) -> _grids.Grid:
    numbers = _E4M3 if self.dtype == 'e4m3' else _E5M2
    return Expanded(numbers) if self.expand else _maps.Scaled(numbers, True)

  def _groups(self, shape: tuple[int, ...]) -> _blocks.Blocks:
    return _blocks.cut(shape, self.block_size)


@dataclasses.dataclass(frozen=True)
class Numbers:
  """The numbers of an fp8 dtype in units of the largest, in order."""

  mantissa: int  # bits
  bias: int  # of the exponent
  top: int  # the code of the largest number

  @property
  def largest(self) -> float:
    """The largest number: 448 or 57344."""
    exponent, mantissa = divmod(self.top, 2**self.mantissa)
    return 2.0 ** (exponent - self.bias) * (1 + mantissa / 2**self.mantissa)

  def value(self, code: chex.Array) -> jax.Array:
    word = (code + self._rebias()) << (23 - self.mantissa)
    normal = lax.bitcast_convert_type(word, jnp.float32)
    subnormal = code.astype(jnp.float32) * self._unit()
    is_normal = code >= 2**self.mantissa
    return jnp.where(is_normal, normal, subnormal) / self.largest

  def below(self, x: chex.Array) -> jax.Array:
    x = x * self.largest
    word = lax.bitcast_convert_type(x, jnp.int32)
    normal = (word >> (23 - self.mantissa)) - self._rebias()
    subnormal = jnp.floor(x / self._unit()).astype(jnp.int32)
    return jnp.where(x >= 2.0 ** (1 - self.bias), normal, subnormal)

  def _rebias(self) -> int:
    """Exponents of float32 are biased by 127."""
    return (127 - self.bias) << self.mantissa

  def _unit(self) -> float:
    """The distance of subnormal numbers."""
    return 2.0 ** (1 - self.bias - self.mantissa)


_E4M3 = Numbers(mantissa=3, bias=7, top=0x7E)  # 0x7F is NaN
_E5M2 = Numbers(mantissa=2, bias=15, top=0x7B)  # 0x7C is infinity


@dataclasses.dataclass(frozen=True)
class Expanded:
  """fp8 numbers to the power 1/k: M (bfloat16), k (8 bits), 8 bits unused."""

  numbers: Numbers

  @property
  def top(self) -> int:
    return self.numbers.top

  def fit(self, x: chex.Array, axes: tuple[int, ...]) -> jax.Array:
    """M and k of each block, uint32, without the axes."""
    size = jnp.abs(x)
    high = jnp.max(size, axes, initial=0.0)
    low = jnp.min(jnp.where(x == 0, jnp.inf, size), axes, initial=jnp.inf)
    finite = high < jnp.inf
    octaves = jnp.log2(high) - jnp.log2(jnp.minimum(low, high))
    reach = 2 * math.log2(self.numbers.largest) - 1
    k = jnp.floor(_SIXTEENTHS * reach / jnp.maximum(octaves, 2.0**-10))
    k = jnp.clip(jnp.where(high > 0, k, 0), _SMALLEST, _LARGEST)
    high = jnp.where(finite, high, jnp.nan)
    rounded = jnp.minimum((_rounding.to_bits(high) + 0xFFFF) >> 16, 0x7F7F)
    rounded = jnp.where(finite, rounded, 0x7FC0)
    return (rounded << 16) | (k.astype(jnp.uint32) << 8)

  def relative(self, x: chex.Array, scale: chex.Array) -> jax.Array:
    high, _ = _unpack(scale, lax.bitcast_convert_type(x, jnp.int32))
    return jnp.where(x == 0, 0.0, jnp.abs(x) / high)

  def below(self, x: chex.Array, scale: chex.Array) -> jax.Array:
    _, k = _unpack(scale, lax.bitcast_convert_type(x, jnp.int32))
    return self.numbers.below(_power(x, k))

  def value(self, code: chex.Array, scale: chex.Array) -> jax.Array:
    _, k = _unpack(scale, code)
    return _power(self.numbers.value(code), 1 / k)

  def absolute(self, value: chex.Array, scale: chex.Array) -> jax.Array:
    high, _ = _unpack(scale, lax.bitcast_convert_type(value, jnp.int32))
    return value * high


def _power(x: chex.Array, k: chex.Array) -> jax.Array:
  """x^k, 0 for 0 and exactly 1 for 1."""
  return jnp.where(x == 0, 0.0, jnp.exp2(k * jnp.log2(x)))


def _unpack(scale: chex.Array, other: chex.Array) -> tuple[jax.Array, jax.Array]:
  """M and k; ``other`` is any number a value, as in ``_log``."""
  word = scale + (other & _FREE).astype(jnp.uint32)
  k = ((word >> 8) & 0xFF).astype(jnp.int32).astype(jnp.float32)
  return _rounding.from_bits((word >> 16) << 16), k / _SIXTEENTHS
