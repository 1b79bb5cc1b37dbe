# SPDX-License-Identifier: Apache-2.0
"""Moments of the last gradients, of each of which there are a few entries."""

from typing import NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp

from optax_mp.optimizers._core import _adam


class Moments(NamedTuple):
  """What makes moments of a window: scalars, and a weight for each place."""

  place: chex.Array  # (), int32: where the newest gradient goes
  first: chex.Array  # (window,), float32: weights of values
  second: chex.Array  # (window,), float32: weights of their squares
  eps: chex.Array

  @classmethod
  def at(cls, count, step, window: int, b1, b2, eps) -> 'Moments':
    """Those of the step that follows ``count`` others.

    The weights sum up to less than 1, since what is older than the window
    still counts in the corrections of bias.
    """
    place = lax.rem(count, jnp.int32(window))
    ages = (place - jnp.arange(window)) % window
    ages = ages.astype(jnp.float32)
    first = (1 - b1) * jnp.power(b1, ages) / _adam.weight(step, b1)
    second = (1 - b2) * jnp.power(b2, ages) / _adam.weight(step, b2)
    return cls(place, first, second, jnp.asarray(eps, jnp.float32))


def written(
  ring: chex.Array, newest: chex.Array, moments: Moments
) -> chex.Array:
  """The window (R, window k) with the newest entries (R, k) in their place."""
  view = jnp.reshape(ring, (*newest.shape[:1], jnp.size(moments.first), -1))
  newest = newest.astype(ring.dtype)
  view = lax.dynamic_update_index_in_dim(view, newest, moments.place, 1)
  return jnp.reshape(view, ring.shape)


def normalized(
  shape: tuple[int, ...],
  indices: chex.Array,
  values: chex.Array,
  moments: Moments,
) -> chex.Array:
  """The first moment over the root of the second: 0 what is in no gradient.

  One gradient after the other: the indices of each differ, so that sums have an
  order and are the same each time.

  Args:
    shape: (R, length) of the result.
    indices: (R, window k), in their rows.
    values: the same.
    moments: weights.

  Returns:
    A float32 array.
  """

  def add(sums, gradient):
    indices, values, first, second = gradient
    values = values.astype(jnp.float32)
    mu = _add(sums[0], indices, first * values)
    nu = _add(sums[1], indices, second * jnp.square(values))
    return (mu, nu), None

  def by_place(ring):
    view = jnp.reshape(ring, (shape[0], jnp.size(moments.first), -1))
    return jnp.moveaxis(view, 1, 0)

  zeros = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
  rings = by_place(indices).astype(jnp.int32), by_place(values)
  (mu, nu), _ = lax.scan(add, zeros, (*rings, moments.first, moments.second))
  return mu / (jnp.sqrt(nu) + moments.eps)


def zeroed(x: chex.Array, indices: chex.Array) -> chex.Array:
  """``x`` (R, length) without what is at the indices (R, k)."""

  def one(x, indices):
    at = x.at[indices]
    return at.set(0.0, unique_indices=True, mode='promise_in_bounds')

  return jax.vmap(one)(x, indices)


def _add(x: chex.Array, indices: chex.Array, values: chex.Array) -> chex.Array:
  def one(x, indices, values):
    at = x.at[indices]
    return at.add(values, unique_indices=True, mode='promise_in_bounds')

  return jax.vmap(one)(x, indices, values)
