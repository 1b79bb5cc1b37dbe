# SPDX-License-Identifier: Apache-2.0
"""Projections of a matrix onto a few directions, and back.

A leaf (..., m, n) is a stack of matrices, each with a projector of its own. It
is *tall* where m >= n. The shorter side is projected: with r directions, a tall
gradient G has x = G P^T of shape (m, r), a wide one x = P^T G of shape (r, n).
Selections keep rows of the longer side instead: r of m, or of n.

Making a projector and using one are two things, so that tests can use recorded
ones: signs of singular vectors and random draws are no contract.
"""

import chex
import jax
from jax import lax
import jax.numpy as jnp

from optax_mp.optimizers._core import _trees

_EXACT = lax.Precision.HIGHEST  # a TPU or GPU would round to fewer bits


def is_tall(shape: tuple[int, ...]) -> bool:
  """Whether m >= n; a square matrix is tall."""
  return shape[-2] >= shape[-1]


def clamped(rank: int, shape: tuple[int, ...]) -> int:
  """The rank, at most that of the matrix."""
  return min(rank, *shape[-2:])


# Projectors with any directions: P is (..., r, n) for tall, (..., m, r) for
# wide.


def basis_shape(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
  """Of the projector for a leaf of a shape."""
  *stack, m, n = shape
  rank = clamped(rank, shape)
  return (*stack, rank, n) if is_tall(shape) else (*stack, m, rank)


def project(g: chex.Array, basis: chex.Array) -> chex.Array:
  """G P^T or P^T G."""
  if is_tall(g.shape):
    return jnp.einsum('...mn,...rn->...mr', g, basis, precision=_EXACT)
  return jnp.einsum('...mr,...mn->...rn', basis, g, precision=_EXACT)


def back(x: chex.Array, basis: chex.Array, tall: bool) -> chex.Array:
  """X P or P x, a matrix again."""
  if tall:
    return jnp.einsum('...mr,...rn->...mn', x, basis, precision=_EXACT)
  return jnp.einsum('...mr,...rn->...mn', basis, x, precision=_EXACT)


def rank_axis(shape: tuple[int, ...]) -> int:
  """The axis of x along which the directions are."""
  return -1 if is_tall(shape) else -2


def svd_basis(g: chex.Array, rank: int) -> chex.Array:
  """The first singular vectors of the shorter side: orthonormal."""
  whole = [*_trees.stack_axes(g), None, None]  # on every device
  g = _trees.sharded_along(g, g, whole)
  u, _, vt = jnp.linalg.svd(g, full_matrices=False)
  rank = clamped(rank, g.shape)
  return vt[..., :rank, :] if is_tall(g.shape) else u[..., :rank]


def gaussian_basis(
  key: chex.PRNGKey, shape: tuple[int, ...], rank: int
) -> chex.Array:
  """Independent N(0, 1/r) entries: E[P P^T] = I, but no projector."""
  rank = clamped(rank, shape)
  normal = jax.random.normal(key, basis_shape(shape, rank), jnp.float32)
  return normal / jnp.sqrt(float(rank))


def orthonormal_basis(
  key: chex.PRNGKey, shape: tuple[int, ...], rank: int
) -> chex.Array:
  """Random directions, orthonormal."""
  normal = jax.random.normal(key, basis_shape(shape, rank), jnp.float32)
  if not is_tall(shape):
    return jnp.linalg.qr(normal)[0]
  return jnp.swapaxes(jnp.linalg.qr(jnp.swapaxes(normal, -1, -2))[0], -1, -2)


# Selections: indices (..., r) along one of the last two axes.


def long_axis(shape: tuple[int, ...]) -> int:
  """The longer of the last two axes; of equal ones the first."""
  return -2 if is_tall(shape) else -1


def norms(g: chex.Array, axis: int) -> chex.Array:
  """2-norms of rows (``axis=-2``) or of columns (-1): (..., m) or (..., n)."""
  return jnp.sqrt(jnp.sum(jnp.square(g), axis=-1 if axis == -2 else -2))


def top_indices(g: chex.Array, rank: int, axis: int) -> chex.Array:
  """Rows or columns of largest norm; of equal ones the first. int32."""
  return lax.top_k(norms(g, axis), min(rank, g.shape[axis]))[1]


def uniform_indices(
  key: chex.PRNGKey, shape: tuple[int, ...], rank: int, axis: int
) -> chex.Array:
  """Distinct random rows or columns, all equally likely. int32."""
  *stack, _, _ = shape
  draws = jax.random.uniform(key, (*stack, shape[axis]))
  return lax.top_k(draws, min(rank, shape[axis]))[1]


def select(g: chex.Array, indices: chex.Array, axis: int) -> chex.Array:
  """The rows (..., r, n) or columns (..., m, r) with those indices."""
  return jnp.take_along_axis(g, _expanded(indices, axis), axis=axis)


def scatter(
  x: chex.Array, indices: chex.Array, axis: int, shape: tuple[int, ...]
) -> chex.Array:
  """Zeros of a shape, with what was selected added in its place.

  Args:
    x: rows or columns; those with equal indices add up.
    indices: (..., r).
    axis: -2 for rows, -1 for columns.
    shape: of the result.

  Returns:
    An array of that shape.
  """

  def one(x, indices):
    rows = x if axis == -2 else x.T
    length = shape[axis]
    out = jnp.zeros((length, rows.shape[1]), x.dtype).at[indices].add(rows)
    return out if axis == -2 else out.T

  for _ in shape[:-2]:
    one = jax.vmap(one)
  return one(x, indices)


def replace(
  g: chex.Array, x: chex.Array, indices: chex.Array, axis: int
) -> chex.Array:
  """``g`` with the rows (``axis=-2``) or columns (-1) of those indices x."""

  def one(g, x, indices):
    return g.at[indices].set(x) if axis == -2 else g.at[:, indices].set(x)

  for _ in g.shape[:-2]:
    one = jax.vmap(one)
  return one(g, x, indices)


def _expanded(indices: chex.Array, axis: int) -> chex.Array:
  return jnp.expand_dims(indices, -1 if axis == -2 else -2)
