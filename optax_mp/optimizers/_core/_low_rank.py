# SPDX-License-Identifier: Apache-2.0
"""Moments along a few directions: what GaLore, Fira and APOLLO share.

A matrix G (..., m, n) has a basis P for its shorter side, see ``_projection``,
and Adam's moments of what P leaves of it, x. The moments have the shape of x
and stay what they are when the basis is made anew.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp
import optax

from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _groups
from optax_mp.optimizers._core import _projection
from optax_mp.optimizers._core import _trees

MakeBasis = Callable[[chex.Array, int], chex.Array]
Projector = str | MakeBasis


def is_projected(p: chex.Array) -> bool:
  """True for matrices and stacks of them; other leaves have plain Adam."""
  return len(p.shape) > 1 and p.size > 0


def zero_moments(params: optax.Params, rank: int) -> Any:
  """A tree of moments: (..., m, r) for tall leaves, (..., r, n) for wide."""

  def zeros(p):
    if not is_projected(p):
      return _trees.zeros(p)
    long = p.ndim + _projection.long_axis(p.shape)
    r = _projection.clamped(rank, p.shape)
    moment = _trees.zeros_along(p, [*_trees.stack_axes(p), long], r)
    if _projection.is_tall(p.shape):
      return moment
    return jnp.swapaxes(moment, -1, -2)

  return jax.tree.map(zeros, params)


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
      f'(gradient, rank); got {projector!r}.'
    )


def make_basis(projector: Projector, g: chex.Array, rank: int) -> chex.Array:
  """By the SVD of a gradient, or as a function of the user's says."""
  if not callable(projector):
    return basis_like(_projection.svd_basis(g, rank), g)
  rank = _projection.clamped(rank, g.shape)
  basis = jnp.asarray(projector(g, rank), jnp.float32)
  wanted = _projection.basis_shape(g.shape, rank)
  if basis.shape != wanted:
    raise ValueError(
      f'`projector` must return an array of shape {wanted} for a gradient of '
      f'shape {g.shape} and rank {rank}; got {basis.shape}.'
    )
  return basis_like(basis, g)


def refreshed(
  due: chex.Array, make: Callable[[], chex.Array], basis: chex.Array
) -> chex.Array:
  """The basis, made anew on steps when that is due and on no other.

  Args:
    due: a bool that depends on the count alone. One that differs along an axis
      of ``vmap`` would have the basis made on every step.
    make: makes it.
    basis: the stored one.

  Returns:
    The basis of this step.
  """
  return lax.cond(due, make, lambda: basis)


def basis_like(basis: chex.Array, g: chex.Array) -> chex.Array:
  """Whole on every device, where an explicit mesh has G in parts."""
  return _trees.sharded_along(basis, g, [*_trees.stack_axes(g), None, None])


def back(x: chex.Array, basis: chex.Array, g: chex.Array) -> chex.Array:
  """What x stands for, a matrix like G."""
  u = _projection.back(x, basis, _projection.is_tall(g.shape))
  return _trees.sharded_along(u, g, range(g.ndim))


def ratios(
  n: chex.Array, x: chex.Array, axis: int | tuple[int, int]
) -> chex.Array:
  r"""How much Adam scales what a gradient has along the directions.

  .. math::
    f = \|N\| / (\|x\| + 10^{-8})

  Args:
    n: N, Adam's step without correction of bias.
    x: what was projected.
    axis: of the directions, for one factor for each row of a tall matrix or
      column of a wide one; both, for one factor.

  Returns:
    An array that broadcasts with the gradient.
  """
  return _norm(n, axis) / (_norm(x, axis) + 1e-8)


def _norm(x, axis):
  return jnp.sqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True))


def alias(
  method: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  betas: tuple[chex.Numeric, chex.Numeric, chex.Numeric],
  weight_decay: Any,
  mask: _adam.Mask,
  matrices: _groups.Matrices,
  adam_learning_rate: optax.ScalarOrSchedule | None,
) -> optax.GradientTransformationExtraArgs:
  """A whole optimizer, as the official codes have it.

  Args:
    method: for ``matrices``.
    learning_rate: of those.
    betas: b1, b2 and eps of Adam for other leaves.
    weight_decay: of weights after the step, for all leaves.
    mask: what to decay.
    matrices: a tree of bools, a function or None.
    adam_learning_rate: of other leaves, or None.

  Returns:
    A transformation.
  """
  own = _groups.own(adam_learning_rate, learning_rate)
  return _groups.alias(
    method,
    _adam.decay_after_step(learning_rate, weight_decay, mask),
    matrices,
    _adam.scale_by_adam(*betas, eps_first=True),
    _adam.decay_after_step(own, weight_decay, mask),
  )
