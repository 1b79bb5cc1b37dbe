# SPDX-License-Identifier: Apache-2.0
"""Code maps: which fractions of a scale have a code.

A map is an increasing sequence of values for the codes 0, 1, ..., ``top``, the
last of them 1. All are arithmetic: ``below`` inverts ``value`` without a
search, so that both fuse into the optimizer's update.
"""

import dataclasses
from typing import Protocol

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from optax_mp.formats import _dynamic
from optax_mp.formats import _ends
from optax_mp.formats import _grids
from optax_mp.formats import _reductions


class Map(Protocol):
  """An increasing sequence of values in [0, 1]."""

  @property
  def top(self) -> int:
    """The largest code."""
    ...

  def value(self, code: jax.Array) -> jax.Array:
    """Int32 codes from 0 to ``top + 1`` -> float32."""
    ...

  def below(self, x: jax.Array) -> jax.Array:
    """The largest code whose value is at most x, for x in [0, 1]."""
    ...


@dataclasses.dataclass(frozen=True)
class Linear:
  """Equal steps: value(n) = n / top."""

  top: int

  def value(self, code: jax.Array) -> jax.Array:
    return code.astype(jnp.float32) / self.top

  def below(self, x: jax.Array) -> jax.Array:
    return jnp.floor(x * self.top).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class LinearNoZero:
  """Equal steps without zero: value(n) = (n + 1) / (top + 1)."""

  top: int

  def value(self, code: jax.Array) -> jax.Array:
    return (code + 1).astype(jnp.float32) / (self.top + 1)

  def below(self, x: jax.Array) -> jax.Array:
    return jnp.floor(x * (self.top + 1)).astype(jnp.int32) - 1


@dataclasses.dataclass(frozen=True)
class Sqrt:
  """Square-root companding: value(n) = (n / top)^2, finest around zero."""

  top: int

  def value(self, code: jax.Array) -> jax.Array:
    root = code.astype(jnp.float32) / self.top
    return root * root

  def below(self, x: jax.Array) -> jax.Array:
    return jnp.floor(self.top * jnp.sqrt(x)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class SqrtLog:
  """Squares of n - 10 from code 16 on, below it ratios of two.

  Adam divides a first moment by the root of a second one, whose own grid has
  equal ratios everywhere: far below the largest of its block the first code of
  ``Sqrt``, 1 / top^2, would be a step of any length. Ratios of four would reach
  further, but rounded stochastically they multiply the square of an average
  that decays by 0.9 by more than 1 in a step: (1 + 4)^2 / (4 4) 0.9^2.
  """

  top: int
  first: int = 16  # the first code that is a square, of 6
  shift: int = 10

  def value(self, code: jax.Array) -> jax.Array:
    root = jnp.maximum(code, self.first) - self.shift
    root = root.astype(jnp.float32) / (self.top - self.shift)
    missing = jnp.maximum(self.first - code, 0)
    # No words of floats: XLA:GPU would take the code for needed once more.
    ratio = (2**self.first >> missing).astype(jnp.float32) * 2.0**-self.first
    return jnp.where(code > 0, root * root * ratio, 0.0)

  def below(self, x: jax.Array) -> jax.Array:
    top = self.top - self.shift
    root = np.float32((self.first - self.shift) / top)
    square = jnp.floor(top * jnp.sqrt(x)).astype(jnp.int32) + self.shift
    x = x / (root * root)
    word = lax.bitcast_convert_type(x, jnp.int32)
    powers = (word >> 23) - 127  # of two, rounded down
    return jnp.where(x < 1, self.first + powers, square)


@dataclasses.dataclass(frozen=True)
class Softsign:
  """With z = n / top: value(n) = z / (2 - z), the inverse of 2x / (1 + x)."""

  top: int

  def value(self, code: jax.Array) -> jax.Array:
    code = code.astype(jnp.float32)
    return code / (2 * self.top - code)

  def below(self, x: jax.Array) -> jax.Array:
    return jnp.floor(2 * self.top * x / (1 + x)).astype(jnp.int32)


BY_NAME = {
  'linear': Linear,
  'softsign': Softsign,
  'sqrt': Sqrt,
  'sqrt_log': SqrtLog,
}


@dataclasses.dataclass(frozen=True)
class Scaled:
  """The grid of a map, in units of the largest magnitude of a block."""

  map: Map
  signed: bool
  even: bool = False

  @property
  def top(self) -> int:
    return self.map.top

  @property
  def infinity(self) -> int:
    one_sided = self.signed and isinstance(self.map, _dynamic.Dynamic)
    return self.top - one_sided

  @property
  def reach(self) -> float:
    return 1.0

  def fit(self, x: jax.Array, over: _reductions.Over) -> jax.Array:
    """The largest magnitude of each block, float32, without the axes.

    The scale of a marked block is negative, and so much larger that the largest
    value has the last code for numbers.
    """
    if self.signed:
      high, marked = _ends.largest(x, over)
    else:
      _, high, marked = _ends.range_of(x, over, signed=False)
    last = self.map.value(jnp.int32(_grids.last(self)))
    # Decoded, the largest number may be an ulp more.
    high = jnp.minimum(high, _ends.LARGEST * (1 - 2.0**-20))
    wider = jnp.clip(high / last, _ends.LEAST, _ends.LARGEST)
    return jnp.where(marked, -wider, high)

  def scaled(self, x: jax.Array, scale: jax.Array) -> _grids.Relative:
    """The magnitude in units of the scale; a zero needs none."""
    x = jnp.where(x == 0, 0.0, jnp.abs(x) / scale)
    return jnp.minimum(jnp.abs(x), 2.0), x < 0

  def below(self, x: jax.Array, scale: jax.Array) -> jax.Array:
    del scale
    return self.map.below(x)

  def value(self, code: jax.Array, scale: jax.Array) -> jax.Array:
    del scale
    return self.map.value(code)

  def unscaled(self, value: jax.Array, scale: jax.Array) -> _grids.Relative:
    return _grids.times(value, scale)
