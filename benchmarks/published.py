# SPDX-License-Identifier: Apache-2.0
"""Formats that optimizers ship Adam's moments in, beside those of our recipes.

All are settings of formats of ours, blocks being cut as they are there: from
the array as one vector. FlashOptim's differ in more than that.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_mp import formats


@dataclasses.dataclass(frozen=True)
class Flat:
  """A format of the array as one vector, with a least scale.

  The vector must be of whole blocks: elsewhere these optimizers pad, or keep
  float32.
  """

  format: Any
  floor: float = 0.0

  def encode(self, x: chex.Array, key: chex.PRNGKey | None = None) -> Any:
    """Stores the vector."""
    flat = jnp.ravel(x)
    scales = self.format.fit(flat)
    if self.floor:
      scales = jnp.maximum(scales, self.floor)
    return self.format.encode(flat, key, scales)

  def decode(self, stored: Any, like: jax.ShapeDtypeStruct) -> chex.Array:
    """Gives the vector the shape of ``like``."""
    flat = jax.ShapeDtypeStruct((math.prod(like.shape),), like.dtype)
    return jnp.reshape(self.format.decode(stored, flat), like.shape)


@dataclasses.dataclass(frozen=True)
class FlashOptim:
  """FlashOptim's moments: groups of 32, float16 scales, rounded to nearest.

  Nearest after companding. Second moments take their root first, and the scale
  is that of the roots.
  """

  signed: bool

  def encode(
    self, x: chex.Array, key: chex.PRNGKey | None = None
  ) -> formats.Block:
    """Codes, and a scale for each 32 of them."""
    del key
    groups = jnp.reshape(x if self.signed else jnp.sqrt(x), (-1, 32))
    scales = jnp.max(jnp.abs(groups), -1, keepdims=True)
    # Where a float16 is zero, this is too.
    scales = jnp.maximum(scales, 1e-12)
    z = groups / scales
    if self.signed:
      z = 2 * z / (1 + jnp.abs(z))
    codes = jnp.floor(self._top * z + 0.5)
    codes = codes.astype(jnp.int8 if self.signed else jnp.uint8)
    return formats.Block(codes, scales.astype(jnp.float16))

  def decode(
    self, stored: formats.Block, like: jax.ShapeDtypeStruct
  ) -> chex.Array:
    """The values of codes, times the rounded scale."""
    z = jnp.asarray(stored.codes, jnp.float32) / self._top
    if self.signed:
      z = z / (2 - jnp.abs(z))
    x = z * stored.scales.astype(jnp.float32)
    x = x if self.signed else x * x
    return jnp.reshape(x, like.shape).astype(like.dtype)

  @property
  def _top(self) -> int:
    return 127 if self.signed else 255


@formats.Stored.register
class CoatBlock(NamedTuple):
  """Codes of groups, and three numbers of each."""

  codes: chex.Array  # (groups, 128), fp8
  scale: chex.Array  # (groups, 1), float32, as the others
  exponent: chex.Array
  centre: chex.Array


@dataclasses.dataclass(frozen=True)
class Coat:
  """COAT's moments: groups of 128, each over its geometric centre to a power.

  As its paper has it: what its kernel makes of groups with a zero in some
  places, where it takes the smallest number for 1e-30, is left out. So are
  exponents above 255, where 1 to that power would depend on its rounding.
  """

  def encode(self, x: chex.Array, key: chex.PRNGKey | None = None) -> CoatBlock:
    """fp8 numbers, and scale, exponent and centre of each 128."""
    del key
    groups = jnp.reshape(x, (-1, 128))
    size = jnp.abs(groups)
    high = jnp.max(size, -1, keepdims=True)
    low = jnp.where(size > 0, size, high)
    low = jnp.min(low, -1, keepdims=True) + 1e-30
    high += 1e-30
    centre = jnp.sqrt(high) * jnp.sqrt(low)
    octaves = jnp.log2(high) - jnp.log2(low)
    exponent = jnp.floor(16 * math.log2(448**2 / 2) / octaves) / 16
    exponent = jnp.minimum(exponent, 255.0)
    scale = (high / centre) ** exponent / 448
    expanded = jnp.sign(groups) * (size / centre) ** exponent / scale
    codes = jnp.clip(expanded, -448, 448).astype(jnp.float8_e4m3fn)
    return CoatBlock(codes, scale, exponent, centre)

  def decode(self, stored: CoatBlock, like: jax.ShapeDtypeStruct) -> chex.Array:
    """The roots of codes, times the centre."""
    expanded = stored.codes.astype(jnp.float32) * stored.scale
    size = jnp.abs(expanded) ** (1 / stored.exponent) * stored.centre
    x = jnp.where(expanded == 0, 0.0, jnp.sign(expanded) * size)
    return jnp.reshape(x, like.shape).astype(like.dtype)


Pair = Mapping[str, Any]  # of 'mu' and 'nu'; None is float32

# torchao's scales are at least this; bitsandbytes has no such floor.
_FLOOR = 1e-12


def _dynamic8(signed: bool) -> Flat:
  settings: Any = {'block_size': 256, 'keep_nonzero': False}
  return Flat(formats.BlockInt(8, signed, 'dynamic', **settings))


def _linear4(**settings: Any) -> formats.BlockInt:
  return formats.BlockInt(4, signed=False, map='linear', **settings)


_DYNAMIC4 = formats.BlockInt(4, map='dynamic')
_E4M3 = Flat(
  formats.Float8('e4m3', block_size=256, expand=False, keep_nonzero=False),
  _FLOOR,
)

PUBLISHED: dict[str, Pair] = {
  'bfloat16, nearest': {'mu': formats.BFloat16(), 'nu': formats.BFloat16()},
  'bfloat16, stochastic': {
    'mu': formats.BFloat16('stochastic'),
    'nu': formats.BFloat16('stochastic'),
  },
  'bitsandbytes, 8 bits': {'mu': _dynamic8(True), 'nu': _dynamic8(False)},
  'torchao, fp8': {'mu': _E4M3, 'nu': _E4M3},
  'COAT, fp8': {'mu': Coat(), 'nu': Coat()},
  'FlashOptim, 8 bits': {'mu': FlashOptim(True), 'nu': FlashOptim(False)},
  'lpmm, 4 bits': {'mu': Flat(_DYNAMIC4), 'nu': _linear4(scale='rank1')},
  'lpmm, 4 bits, factored': {'mu': Flat(_DYNAMIC4), 'nu': formats.Factored()},
  'torchao, 4 bits': {
    'mu': Flat(_DYNAMIC4, _FLOOR),
    'nu': Flat(_linear4(), _FLOOR),
  },
}

_SOFTSIGN4 = formats.BlockInt(4, map='softsign', rounding='stochastic')


def _first(**settings: Any) -> formats.BlockInt:
  below = 20 if settings['map'] == 'sqrt_log' else 10
  settings |= {'rounding': 'stochastic', 'stochastic_below': below}
  return formats.BlockInt(8, **settings)


def _second(bits: Any = 8, **settings: Any) -> formats.BlockInt:
  return formats.BlockInt(bits, signed=False, rounding='stochastic', **settings)


# The recipes with b1=0.9, by their names; a test compares.
OURS: dict[str, Pair] = {
  'adamw_8bit': {'mu': _first(map='sqrt_log'), 'nu': _second()},
  'coat_adamw': {
    'mu': formats.Float8(),
    'nu': formats.Float8(rounding='stochastic', signed=False),
  },
  'flash_adamw': {
    'mu': _first(map='softsign', block_size=32),
    'nu': _second(map='sqrt', block_size=32),
  },
  'adamw_4bit': {'mu': _SOFTSIGN4, 'nu': _second(4)},
  'adamw_4bit_factored': {'mu': _SOFTSIGN4, 'nu': formats.Factored()},
}


def bytes_per_parameter(
  pair: Pair, shape: tuple[int, ...] = (4096, 4096)
) -> float:
  """Bytes that both moments take for each value of an array."""
  return sum(formats.bits_per_value(x, shape) for x in pair.values()) / 8
