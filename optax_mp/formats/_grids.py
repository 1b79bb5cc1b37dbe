# SPDX-License-Identifier: Apache-2.0
"""Rounding to a grid: the one place where a value becomes a code."""

from typing import Protocol

import chex
import jax
import jax.numpy as jnp

from optax_mp.formats import _rounding

_TINY = 2.0**-126  # the smallest normal number


class Grid(Protocol):
  """The values that codes stand for, in the units of a block."""

  @property
  def top(self) -> int:
    """The largest code."""
    ...

  @property
  def even(self) -> bool:
    """Whether noise is to be even over steps."""
    ...

  def fit(self, x: jax.Array, axes: tuple[int, ...], /) -> jax.Array:
    """What each block needs to know, without the axes."""
    ...

  def scaled(self, x: jax.Array, scale: jax.Array, /) -> jax.Array:
    """The magnitude of x in the block's units."""
    ...

  def below(self, x: jax.Array, scale: jax.Array, /) -> jax.Array:
    """The largest code whose value is at most the relative x."""
    ...

  def value(self, code: jax.Array, scale: jax.Array, /) -> jax.Array:
    """The relative value of a code, from 0 to ``top + 1``."""
    ...

  def unscaled(self, value: jax.Array, scale: jax.Array, /) -> jax.Array:
    """The inverse of ``scaled``."""
    ...


def round_to(
  grid: Grid,
  x: jax.Array,
  scale: jax.Array,
  key: chex.PRNGKey | None,
  keep_nonzero: bool,
  stochastic_below: int | None = None,
) -> jax.Array:
  """The code of each magnitude: one of the two grid points around it.

  Args:
    grid: where codes are.
    x: float32.
    scale: what ``grid.fit`` found, for each value.
    key: for stochastic rounding: up with the probability (x - low) / (high -
      low), so that the mean is x. None for the nearer one.
    keep_nonzero: whether what is not zero may not become the code 0.
    stochastic_below: from this code on the nearer one is taken all the same.

  Returns:
    int32 codes from 0 to ``grid.top``.
  """
  nonzero = ~_rounding.is_zero(x)  # it may be, in units of the scale
  x = grid.scaled(x, scale)
  threshold = 0.5
  if key is not None:
    noise = _rounding.random_bits(key, x.shape, even=grid.even)
    threshold = _rounding.uniform(noise)
  code = jnp.clip(grid.below(x, scale), 0, grid.top)
  if stochastic_below is not None:
    threshold = jnp.where(code < stochastic_below, threshold, 0.5)
  low, high = grid.value(code, scale), grid.value(code + 1, scale)
  up = threshold * (high - low) < x - low
  code = jnp.minimum(code + up.astype(jnp.int32), grid.top)
  if keep_nonzero:
    code = jnp.maximum(code, nonzero.astype(jnp.int32))
  return code


def value_of(grid: Grid, code: jax.Array, scale: jax.Array) -> jax.Array:
  """The magnitude of a code."""
  return grid.unscaled(grid.value(code, scale), scale)


def times(value: jax.Array, scale: jax.Array) -> jax.Array:
  """What is not zero in units of a scale does not underflow to it."""
  product = value * scale
  least = jnp.minimum(scale, _TINY)  # the scale is 0 where all are
  return jnp.where(value > 0, jnp.maximum(product, least), product)
