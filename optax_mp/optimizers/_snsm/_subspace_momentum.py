# SPDX-License-Identifier: Apache-2.0
"""Subspace-Momentum: momentum along a few directions, none along the others."""

from typing import Any, NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp
import optax

from optax_mp.optimizers._core import _bases
from optax_mp.optimizers._core import _checks
from optax_mp.optimizers._core import _momentum
from optax_mp.optimizers._core import _projection
from optax_mp.optimizers._core import _trees

NOTHING = _trees.NOTHING
KINDS = ('svd', 'random', 'topk', 'uniform')


class ScaleBySubspaceMomentumState(NamedTuple):
  """The momentum within the subspace, and what the subspace is.

  Of a leaf that is no matrix, the momentum is whole and there is no projector;
  nor is there one of ``'random'`` directions, which the key gives again.
  """

  count: chex.Array  # (), int32
  mu: optax.Updates  # (..., m, r) or (..., r, n), float32
  projector: Any  # (..., r, n) or (..., m, r), float32; or (..., r), int32
  rng_key: Any  # (2,), uint32, where projectors are drawn


def scale_by_subspace_momentum(
  b1: chex.Numeric = 0.9,
  rank: int = 128,
  gap: int = 200,
  *,
  projector: _bases.Projector = 'svd',
  on_refresh: str = 'reset',
  bias_correction: bool = False,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Momentum within a subspace, and outside of it the gradient as it is.

  **Stored:** of a matrix (m, n), in float32: 4 r max(m, n) bytes of momentum
  and 4 r min(m, n) of directions for ``'svd'``, none for ``'random'``; 4 r
  min(m, n) and 4 r for ``'topk'`` and ``'uniform'``. Of other leaves 4 bytes
  per parameter. With P the orthogonal projector onto the subspace:

  .. math::
    M \leftarrow b_1 M + (1 - b_1) P G, \quad N = M + (G - P G)

  Args:
    b1: decay of the momentum.
    rank: r; at most the shorter side of a matrix.
    gap: a new subspace at the steps t = 1 and t = gap, 2 gap, 3 gap, ..., so
      that the first one lasts for a step less than the others.
    projector: ``'svd'``, the first singular vectors of the gradient's shorter
      side; ``'random'``, orthonormal directions of that side (those of
      :func:`apollo` are not), made again from the key at each step: a QR
      decomposition of (min(m, n), r) in place of 4 r min(m, n) bytes;
      ``'topk'`` and ``'uniform'``, the rows (or columns, if they are more) of
      largest norm or drawn at random. Or a function of a gradient (..., m, n),
      r and a key to orthonormal directions, (..., r, n) if m >= n and else
      (..., m, r), or to int32 indices (..., r).
    on_refresh: ``'reset'``: the momentum starts from 0 in a new subspace;
      ``'keep'``: its coordinates become those along the new directions.
    bias_correction: divides N by 1 - b1^t, also where N has no momentum: times
      10 at the first step with the default b1.
    seed: of what is drawn.

  Returns:
    A transformation.

  Raises:
    ValueError: for a decay outside [0, 1), a rank or gap below 1, an unknown
      projector or ``on_refresh``; in ``init``, for a function that returns no
      projector.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_mp import optimizers
    >>> params = {'w': jnp.ones((64, 16))}
    >>> tx = optimizers.scale_by_subspace_momentum(rank=4, projector='topk')
    >>> state = tx.init(params)
    >>> state.mu['w'].shape, state.projector['w'].shape
    ((4, 16), (4,))

  **Caveats:** a stack (L, m, n) has a subspace a layer. Under ``vmap`` over
  layers with a count each, all steps make new projectors, because a branch
  that differs among layers is none. The compiled program reserves what an SVD
  needs, also at steps without one; on several devices it is of the whole
  matrix on each. The arithmetic of ``'random'`` is r / max(m, n) of that of
  projecting, but a QR decomposition goes column by column.

  References:
    Nguyen and Nguyen, `Lean and Mean Adaptive Optimization via Subset-Norm
    and Subspace-Momentum with Convergence Guarantees
    <https://arxiv.org/abs/2411.07120>`_, 2025
  """
  _checks.decays(b1=b1)
  _checks.whole(rank=rank, gap=gap)
  _checks.one_of(('reset', 'keep'), on_refresh=on_refresh)
  if not callable(projector):
    _checks.one_of(KINDS, projector=projector)
  is_drawn = projector not in ('svd', 'topk')

  def init_fn(params):
    stored = jax.tree.map(lambda p: _zero_projector(p, projector, rank), params)
    mu = jax.tree.map(lambda p: _zero_momentum(p, projector, rank), params)
    key = _trees.raw_key(seed) if is_drawn else NOTHING
    count = jnp.zeros((), jnp.int32)
    return ScaleBySubspaceMomentumState(count, mu, stored, key)

  def update_fn(updates, state, params=None, **extra_args):
    del params
    count = _trees.increment(state.count)
    period = lax.div(count, jnp.int32(gap))
    due = (count == 1) | (lax.rem(count, jnp.int32(gap)) == 0)
    share = _momentum.unbiased(b1, count, bias_correction)
    keys = None
    if is_drawn:
      layer = extra_args.get('layer')
      keys = _trees.leaf_keys(updates, state.rng_key, period, layer)

    def leaf(g, mu, stored, key):
      if not _bases.is_projected(g):
        mu = b1 * mu + (1 - b1) * g
        return share * mu, mu, stored

      def make():
        return make_projector(projector, g, rank, key)

      if projector == 'random':
        now = make()
      else:
        now = stored = _bases.refreshed(due, make, stored, g)
      if on_refresh == 'reset':
        mu = jnp.where(due, 0.0, mu)
      n, mu = _with_momentum(g, mu, now, b1)
      return share * n, mu, stored

    updates, mu, stored = _trees.map_leaves(
      leaf, updates, (state.mu, state.projector), keys
    )
    return updates, ScaleBySubspaceMomentumState(
      count, mu, stored, state.rng_key
    )

  return _trees.in_float32(
    optax.GradientTransformationExtraArgs(init_fn, update_fn)
  )


def make_projector(
  projector: _bases.Projector, g: chex.Array, rank: int, key: Any
) -> chex.Array:
  """Directions (..., r, n) or (..., m, r), or int32 indices (..., r)."""
  rank = _projection.clamped(rank, g.shape)
  axis = _projection.long_axis(g.shape)
  if callable(projector):
    made = projector(g, rank, key)
  elif projector == 'svd':
    made = _projection.svd_basis(g, rank)
  elif projector == 'random':
    made = _projection.orthonormal_basis(key, g.shape, rank)
  elif projector == 'topk':
    made = _projection.top_indices(_along_whole(g, axis), rank, axis)
  else:
    made = _projection.uniform_indices(key, g.shape, rank, axis)
  after = [None] * (made.ndim - g.ndim + 2)
  return _trees.sharded_along(made, g, [*_trees.stack_axes(g), *after])


def _with_momentum(g, mu, projector, b1):
  """N and M: what is along the subspace replaced by its moving average."""
  if jnp.issubdtype(projector.dtype, jnp.floating):
    x = _projection.project(g, projector)
    mu = b1 * mu + (1 - b1) * x
    return g + _bases.back(mu - x, projector, g), mu
  axis = _projection.long_axis(g.shape)
  whole = _along_whole(g, axis)
  mu = b1 * mu + (1 - b1) * _projection.select(whole, projector, axis)
  n = _projection.replace(whole, mu, projector, axis)
  return _trees.sharded_along(n, g, range(g.ndim)), mu


def _along_whole(g, axis):
  """On an explicit mesh, not cut where rows or columns are chosen."""
  axes = [None if i == g.ndim + axis else i for i in range(g.ndim)]
  return _trees.sharded_along(g, g, axes)


def _zero_projector(p, projector, rank):
  if projector == 'random' or not _bases.is_projected(p):
    return NOTHING
  shape, dtype = _projector_like(p, projector, rank)
  zeros = _trees.zeros_along(
    p, _trees.stack_axes(p), *shape[len(p.shape) - 2 :]
  )
  return zeros.astype(dtype)


def _zero_momentum(p, projector, rank):
  if not _bases.is_projected(p):
    return _trees.zeros(p)
  _, dtype = _projector_like(p, projector, rank)
  axis = _projection.long_axis(p.shape)  # the one that is kept
  if jnp.issubdtype(dtype, jnp.integer):
    axis = -3 - axis
  return _bases.zero_moment(p, axis, rank)


def _projector_like(p, projector, rank):
  """Its shape and dtype, for a parameter that has one."""
  basis = _projection.basis_shape(p.shape, rank)
  indices = (*p.shape[:-2], _projection.clamped(rank, p.shape))
  if not callable(projector):
    is_basis = projector in ('svd', 'random')
    return (basis, jnp.float32) if is_basis else (indices, jnp.int32)
  made = jax.eval_shape(
    lambda g, key: projector(g, _projection.clamped(rank, p.shape), key),
    jax.ShapeDtypeStruct(p.shape, jnp.float32),
    jax.random.key(0),
  )
  if (made.shape, made.dtype) not in (
    (basis, jnp.float32),
    (indices, jnp.int32),
  ):
    raise ValueError(
      f'`projector` must return float32 directions of shape {basis} or int32 '
      f'indices of shape {indices} for a gradient of shape {p.shape}; got '
      f'{made.dtype} of shape {made.shape}.'
    )
  return made.shape, made.dtype
