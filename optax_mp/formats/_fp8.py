# SPDX-License-Identifier: Apache-2.0
"""The numbers of fp8, and those of COAT's dynamic range expansion, as grids."""

import dataclasses
import math

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from optax_mp.formats import _ends
from optax_mp.formats import _grids
from optax_mp.formats import _reductions
from optax_mp.formats import _rounding

# Exponents of the expansion are multiples of 1/16, in 8 bits.
_SIXTEENTHS = 16.0
_SMALLEST, _LARGEST = 8, 255
_FREE = 0xFF
_ONE = 0x3F800000  # the word of 1.0


@dataclasses.dataclass(frozen=True)
class Numbers:
  """The numbers of an fp8 dtype in order, a map in units of the largest."""

  mantissa: int  # bits
  bias: int  # of the exponent
  top: int  # the code of the largest number

  @property
  def largest(self) -> float:
    """The largest number: 448 or 57344."""
    return self.normal(self.top)

  def normal(self, code: int) -> float:
    """The number of a code that is known, if it is a normal one."""
    exponent, mantissa = divmod(code, 2**self.mantissa)
    return 2.0 ** (exponent - self.bias) * (1 + mantissa / 2**self.mantissa)

  def number(self, code: jax.Array) -> jax.Array:
    """Int32 code -> the number, float32, exactly."""
    word = (code + self._rebias()) << (23 - self.mantissa)
    normal = lax.bitcast_convert_type(word, jnp.float32)
    subnormal = code.astype(jnp.float32) * self._unit()
    return jnp.where(code >= 2**self.mantissa, normal, subnormal)

  def code(self, number: jax.Array) -> jax.Array:
    """The largest code whose number is at most the one given."""
    word = lax.bitcast_convert_type(number, jnp.int32)
    normal = (word >> (23 - self.mantissa)) - self._rebias()
    subnormal = jnp.floor(number / self._unit()).astype(jnp.int32)
    return jnp.where(number >= 2.0 ** (1 - self.bias), normal, subnormal)

  def fraction(self, number: jax.Array) -> jax.Array:
    """The number in units of the largest.

    A product, because before JAX 0.10.1 XLA makes one of a division by a
    constant under ``jit`` alone: 1 ulp apart, and ``_power`` makes 12 of it.
    """
    return number * (1 / self.largest)

  def value(self, code: jax.Array) -> jax.Array:
    return self.fraction(self.number(code))

  def below(self, x: jax.Array) -> jax.Array:
    return self.code(x * self.largest)

  def _rebias(self) -> int:
    """Exponents of float32 are biased by 127."""
    return (127 - self.bias) << self.mantissa

  def _unit(self) -> float:
    """The distance of subnormal numbers."""
    return 2.0 ** (1 - self.bias - self.mantissa)


E4M3 = Numbers(mantissa=3, bias=7, top=0x7E)  # 0x7F is NaN
E5M2 = Numbers(mantissa=2, bias=15, top=0x7B)  # 0x7C is infinity


@dataclasses.dataclass(frozen=True)
class Expanded:
  """fp8 numbers to the power 1/k: M (bfloat16), k (8 bits), 8 bits unused.

  The sign bit of M marks a block (see ``_ends``).
  """

  numbers: Numbers
  signed: bool
  even: bool = False

  @property
  def top(self) -> int:
    return self.numbers.top

  @property
  def infinity(self) -> int:
    return self.top

  @property
  def reach(self) -> float:
    return 1.0

  def fit(self, x: jax.Array, over: _reductions.Over) -> jax.Array:
    """M and k of each block, uint32, without the axes."""
    size = jnp.abs(x) if self.signed else x
    low, high, marked = _ends.range_of(size, over, self.signed)
    k = jnp.where(high > 0, self._exponent(low, high), _SMALLEST)
    k = jnp.where(marked, _SMALLEST, k)
    # The scale at which the largest value has the last code for numbers. The
    # largest value of a stored block has the same one, however this rounds.
    last = self.numbers.normal(_grids.last(self)) / self.numbers.largest
    wider = high * ((1 - 2.0**-17) / _power_of(last, _SIXTEENTHS / _SMALLEST))
    wider = jnp.clip(wider, _ends.LEAST, _ends.LARGEST)
    high = jnp.where(marked, wider, high)
    # Rounded up, so that x / M is at most 1, but not to infinity.
    rounded = (_rounding.to_bits(high) + 0xFFFF) >> 16
    rounded = jnp.minimum(rounded, 0x7F7F) | (marked.astype(jnp.uint32) << 15)
    return (rounded << 16) | (k.astype(jnp.uint32) << 8)

  def _exponent(self, low: jax.Array, high: jax.Array) -> jax.Array:
    """16 k: the range of the dtype over that of the block, in octaves."""
    octaves = jnp.log2(high) - jnp.log2(jnp.minimum(low, high))
    reach = 2 * math.log2(self.numbers.largest) - 1
    k = jnp.floor(_SIXTEENTHS * reach / jnp.maximum(octaves, 2.0**-10))
    return jnp.clip(k, _SMALLEST, _LARGEST)

  def scaled(self, x: jax.Array, scale: jax.Array) -> _grids.Relative:
    high, _ = _unpack(scale, lax.bitcast_convert_type(x, jnp.int32))
    x = jnp.where(x == 0, 0.0, jnp.abs(x) / high)
    return jnp.minimum(jnp.abs(x), 2.0), x < 0

  def below(self, x: jax.Array, scale: jax.Array) -> jax.Array:
    _, k = _unpack(scale, lax.bitcast_convert_type(x, jnp.int32))
    return self.numbers.below(_power(x, k))

  def value(self, code: jax.Array, scale: jax.Array) -> jax.Array:
    return contract(self.numbers.value(code), scale)

  def unscaled(self, value: jax.Array, scale: jax.Array) -> _grids.Relative:
    high, _ = _unpack(scale, lax.bitcast_convert_type(value, jnp.int32))
    return _grids.times(value, high)


def contract(fraction: jax.Array, scale: jax.Array) -> jax.Array:
  """Undoes the expansion of fractions of the largest number."""
  _, k = _unpack(scale, lax.bitcast_convert_type(fraction, jnp.int32))
  return _power(fraction, 1 / k)


def _power(x: jax.Array, k: jax.Array) -> jax.Array:
  """x^k, with the word of a float32 for its logarithm; 0 for 0, 1 for 1.

  With true logarithms the compiler would find it cheaper to keep moments in
  float32 between the two kernels of a step than to compute them again.
  """
  words = lax.bitcast_convert_type(x, jnp.int32) - _ONE
  words = (words.astype(jnp.float32) * k).astype(jnp.int32) + _ONE
  power = lax.bitcast_convert_type(jnp.maximum(words, 0), jnp.float32)
  return jnp.where(x == 0, 0.0, power)


def _power_of(x: float, k: float) -> float:
  """:func:`_power` of a number that is known."""
  word = int((int(np.float32(x).view(np.int32)) - _ONE) * k) + _ONE
  return float(np.int32(word).view(np.float32))


def _unpack(scale: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
  """M and k; ``other`` is any number a value, as in ``_log``."""
  word = scale + (other & _FREE).astype(jnp.uint32)
  k = ((word >> 8) & 0xFF).astype(jnp.int32).astype(jnp.float32)
  return _rounding.from_bits((word >> 16) << 16), k / _SIXTEENTHS
