# SPDX-License-Identifier: Apache-2.0
"""Code maps: which fractions of a scale have a code.

A map is an increasing sequence of values for the codes 0, 1, ..., ``top``, the
last of them 1. All are arithmetic: ``below`` inverts ``value`` without a
search, so that both fuse into the optimizer's update.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from optax_mp.formats import _blocks
from optax_mp.formats import _grids


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
class Softsign:
  """With z = n / top: value(n) = z / (2 - z), the inverse of 2x / (1 + x)."""

  top: int

  def value(self, code: jax.Array) -> jax.Array:
    code = code.astype(jnp.float32)
    return code / (2 * self.top - code)

  def below(self, x: jax.Array) -> jax.Array:
    return jnp.floor(2 * self.top * x / (1 + x)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Scaled:
  """The grid of a map, in units of the largest magnitude of a block."""

  map: Map
  signed: bool
  even: bool = False

  @property
  def top(self) -> int:
    return self.map.top

  def fit(self, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The largest magnitude, float32, without the axes.

    NaN in a block with a NaN or an infinity, or a negative value where there
    are no signs.
    """
    size = x if self.signed else jnp.where(x < 0, jnp.nan, x)
    scale = _blocks.largest(size, axes)
    return jnp.where(scale < jnp.inf, scale, jnp.nan)

  def scaled(self, x: jax.Array, scale: jax.Array) -> jax.Array:
    """The magnitude in units of the scale; a zero needs none."""
    return jnp.where(x == 0, 0.0, jnp.abs(x) / scale)

  def below(self, x: jax.Array, scale: jax.Array) -> jax.Array:
    del scale
    return self.map.below(x)

  def value(self, code: jax.Array, scale: jax.Array) -> jax.Array:
    del scale
    return self.map.value(code)

  def unscaled(self, value: jax.Array, scale: jax.Array) -> jax.Array:
    return _grids.times(value, scale)
