# SPDX-License-Identifier: Apache-2.0
"""Subset-Norm: one second moment for each subset of coordinates."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _checks
from optax_mp.optimizers._core import _subsets
from optax_mp.optimizers._core import _trees


class ScaleBySubsetNormState(NamedTuple):
  """A second moment for each subset, and what the momentum keeps."""

  count: chex.Array  # (), int32
  nu: optax.Updates  # (..., max(m, n)) or (..., m n / k), float32
  inner_state: optax.OptState  # of `momentum`


def scale_by_subset_norm(
  b2: chex.Numeric = 0.999,
  eps: chex.Numeric = 1e-6,
  *,
  momentum: optax.GradientTransformation | None = None,
  bias_correction: bool = True,
  accumulate: bool = False,
  subset_size: int | str | None = 'heuristic',
  square_axis: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Divides by the root of a second moment for each subset of coordinates.

  **Stored:** one float32 number a subset, and the state of ``momentum``. With
  N what ``momentum`` makes of the gradient G, and S its subsets:

  .. math::
    v_S \leftarrow b_2 v_S + (1 - b_2) \sum_{i \in S} G_i^2, \quad
    D_S = \sqrt{1 - b_2^t} \, N_S / (\sqrt{v_S} + \epsilon)

  Both see the raw gradient, which is why the momentum is an argument and does
  not stand before this transformation in a chain.

  Args:
    b2: decay of the second moment.
    eps: added to its root, before the bias is corrected; larger than 0.
    momentum: any transformation, in float32, such as
      :func:`scale_by_subspace_momentum`, ``optax.ema`` or ``optax.trace``; it
      corrects its own bias. None: N = G.
    bias_correction: False leaves out the factor :math:`\sqrt{1 - b_2^t}`.
    accumulate: AdaGrad, :math:`v_S \leftarrow v_S + \sum G_i^2`, whatever b2
      is; without ``bias_correction``, which would then be 0.
    subset_size: see :func:`adamw_sn`; None is one subset a coordinate.
    square_axis: see :func:`adamw_sn`.

  Returns:
    A transformation.

  Raises:
    ValueError: for a decay outside [0, 1), an eps of 0, unknown subsets, or
      ``accumulate`` with ``bias_correction``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from optax_mp import optimizers
    >>> params = {'w': jnp.ones((4, 9))}
    >>> tx = optax.chain(
    ...   optimizers.scale_by_subset_norm(momentum=optax.trace(0.9)),
    ...   optax.scale_by_learning_rate(1e-2),
    ... )
    >>> updates, _ = tx.update(params, tx.init(params))
    >>> updates['w'].sum(0)[0].round(4)  # of length 1/2, not 1
    Array(-0.02, dtype=float32)

  References:
    Nguyen and Nguyen, `Lean and Mean Adaptive Optimization via Subset-Norm
    and Subspace-Momentum with Convergence Guarantees
    <https://arxiv.org/abs/2411.07120>`_, 2025
  """
  _checks.decays(b2=b2)
  _checks.positive(eps=eps)
  _subsets.check_subset_size(subset_size, square_axis)
  if accumulate and bias_correction:
    raise ValueError(
      '`bias_correction` must be False with `accumulate`, whose sums have no '
      'bias; got True.'
    )
  inner = optax.with_extra_args_support(momentum or optax.identity())

  def init_fn(params):
    _subsets.warn_of_single(params, subset_size)
    nu = jax.tree.map(
      lambda p: _subsets.zero_moments(p, blocks_of(p.shape)), params
    )
    count = jnp.zeros((), jnp.int32)
    wide = optax.tree.cast(params, jnp.float32)  # as `update` has them
    return ScaleBySubsetNormState(count, nu, inner.init(wide))

  def blocks_of(shape):
    return _subsets.subsets(shape, subset_size, square_axis)

  def update_fn(updates, state, params=None, **extra_args):
    count = _trees.increment(state.count)
    numerators, inner_state = inner.update(
      updates, state.inner_state, params, **extra_args
    )
    share = jnp.ones(())
    if bias_correction:
      share = jnp.sqrt(_adam.weight(count, b2))

    def leaf(g, nu, n):
      blocks = blocks_of(g.shape)
      square = _subsets.sums(jnp.square(g), blocks)
      nu = nu + square if accumulate else b2 * nu + (1 - b2) * square
      scale = share / (jnp.sqrt(nu) + eps)
      return n * _subsets.spread(scale, blocks, g), nu

    updates, nu = _trees.map_leaves(leaf, updates, [state.nu], numerators)
    return updates, ScaleBySubsetNormState(count, nu, inner_state)

  return _trees.in_float32(
    optax.GradientTransformationExtraArgs(init_fn, update_fn)
  )
