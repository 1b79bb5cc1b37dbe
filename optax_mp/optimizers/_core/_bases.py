# SPDX-License-Identifier: Apache-2.0
"""Bases of subspaces of gradients, and the state that belongs to them.

A matrix G (..., m, n) has a basis P for its shorter side, see ``_projection``,
and moments of what P leaves of it.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp
import optax

from optax_mp.optimizers._core import _projection
from optax_mp.optimizers._core import _trees

Projector = str | Callable[[chex.Array, int, chex.PRNGKey], chex.Array]


def is_projected(p: chex.Array) -> bool:
  """True for matrices and stacks of them."""
  return len(p.shape) > 1 and p.size > 0


def zero_moments(params: optax.Params, rank: int) -> Any:
  """A tree of moments: (..., m, r) for tall leaves, (..., r, n) for wide."""

  def zeros(p):
    if not is_projected(p):
      return _trees.zeros(p)
    return zero_moment(p, _projection.long_axis(p.shape), rank)

  return jax.tree.map(zeros, params)


def zero_moment(p: chex.Array, axis: int, rank: int) -> chex.Array:
  """Zeros along one of a matrix's axes, -2 or -1; the other has length r."""
  axes = [*_trees.stack_axes(p), len(p.shape) + axis]
  moment = _trees.zeros_along(p, axes, _projection.clamped(rank, p.shape))
  return moment if axis == -2 else jnp.swapaxes(moment, -1, -2)


def zero_bases(params: optax.Params, rank: int) -> Any:
  """A tree of bases, ``NOTHING`` for leaves that are not projected."""

  def zeros(p):
    *_, rows, cols = _projection.basis_shape(p.shape, rank)
    return _trees.zeros_along(p, _trees.stack_axes(p), rows, cols)

  return _of_projected(params, zeros)


def zero_norms(params: optax.Params) -> Any:
  """A tree of norms, one for each matrix: (...)."""
  return _of_projected(
    params, lambda p: _trees.zeros_along(p, _trees.stack_axes(p))
  )


def nothing(params: optax.Params) -> Any:
  """A tree of ``NOTHING``."""
  return jax.tree.map(lambda _: _trees.NOTHING, params)


def _of_projected(params, make):
  return jax.tree.map(
    lambda p: make(p) if is_projected(p) else _trees.NOTHING, params
  )


def check_projector(projector: Any, known: tuple[str, ...]) -> None:
  """Raises a ValueError for what is neither a known name nor a function."""
  if not callable(projector) and projector not in known:
    raise ValueError(
      f'`projector` must be {" or ".join(map(repr, known))}, or a function of '
      f'(gradient, rank, key); got {projector!r}.'
    )


def made(
  projector: Projector, g: chex.Array, rank: int, key: Any
) -> chex.Array:
  """What a projector makes of a gradient.

  Args:
    projector: ``'svd'``, ``'random'``, or a function of (gradient, rank, key).
    g: the gradient.
    rank: at most its shorter side is used.
    key: for all but ``'svd'``.

  Returns:
    The basis, float32.
  """
  rank = _projection.clamped(rank, g.shape)
  if callable(projector):
    basis = jnp.asarray(projector(g, rank, key), jnp.float32)
  elif projector == 'svd':
    basis = _projection.svd_basis(g, rank)
  else:
    basis = _projection.gaussian_basis(key, g.shape, rank)
  wanted = _projection.basis_shape(g.shape, rank)
  if basis.shape != wanted:
    raise ValueError(
      f'`projector` must return an array of shape {wanted} for a gradient of '
      f'shape {g.shape} and rank {rank}; got {basis.shape}.'
    )
  return _whole(basis, g)


def _whole(basis: chex.Array, g: chex.Array) -> chex.Array:
  """The basis, whole on every device where an explicit mesh has G in parts."""
  # A matrix for each of a stack, or the numbers of rows.
  stack = _trees.stack_axes(g)
  whole = [None] * (basis.ndim - len(stack))
  return _trees.sharded_along(basis, g, [*stack, *whole])


def refreshed(
  due: chex.Array,
  make: Callable[[], chex.Array],
  stored: chex.Array,
  g: chex.Array,
) -> chex.Array:
  """The basis, made anew on steps when that is due and on no other.

  Args:
    due: a bool that depends on the count alone. One that differs along an axis
      of ``vmap`` would have the basis made on every step.
    make: makes it.
    stored: the basis of the step before.
    g: the gradient.

  Returns:
    The basis of this step.
  """
  # It comes in parts where a sharding was asked for that `init` does not give.
  stored = _whole(stored, g)
  return lax.cond(due, make, lambda: stored)


def back(x: chex.Array, basis: chex.Array, g: chex.Array) -> chex.Array:
  """What x stands for, a matrix like G."""
  u = _projection.back(x, basis, _projection.is_tall(g.shape))
  return _trees.sharded_along(u, g, range(g.ndim))
