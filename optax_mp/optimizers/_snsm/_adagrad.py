# SPDX-License-Identifier: Apache-2.0
"""AdaGrad with Subset-Norm, and with Subspace-Momentum besides."""

import chex
import optax

from optax_mp._core import _hyperparams
from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _bases
from optax_mp.optimizers._core import _groups
from optax_mp.optimizers._core import _momentum
from optax_mp.optimizers._snsm import _subset_norm
from optax_mp.optimizers._snsm import _subspace_momentum


@_hyperparams.factory()
def adagrad_sn(
  learning_rate: optax.ScalarOrSchedule,
  b1: chex.Numeric = 0.9,
  eps: chex.Numeric = 1e-6,
  *,
  weight_decay: chex.Numeric = 0.0,
  mask: _adam.Mask = None,
  subset_size: int | str | None = 'heuristic',
  square_axis: int = 0,
  matrices: _groups.Matrices = _groups.hidden_matrices,
  other_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
  """AdaGrad with momentum and Subset-Norm.

  **Stored:** as :func:`adamw_sn`, in whose equations the sums of squares now
  add up, without decay, and no bias is corrected.

  Args:
    learning_rate: see :func:`adamw_sn`; for AdaGrad the authors take 1.
    b1: see there.
    eps: see there.
    weight_decay: see there.
    mask: see there.
    subset_size: see there.
    square_axis: see there.
    matrices: see there; the rest gets AdaGrad with momentum.
    other_learning_rate: for that rest, if not ``learning_rate``.

  Returns:
    A transformation.

  Raises:
    ValueError: as :func:`scale_by_subset_norm` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_mp
    >>> params = {'kernel': jnp.ones((1024, 1024))}
    >>> tx = optax_mp.adagrad_sn(1.0)
    >>> plan = optax_mp.memory.plan(tx, params, gradients=None)
    >>> print(f'{plan.bytes_per_param - 4:.3f}')
    4.004

  **Caveats:** under ``optax.inject_hyperparams``, ``static_args`` are mask,
  subset_size, square_axis and matrices.
  """
  average = _momentum.scale_by_ema(b1, False)
  return _groups.with_rates(
    _accumulated(average, eps, subset_size, square_axis),
    _accumulated(average, eps, None, 0),
    _adam.decay_after_step,
    (learning_rate, other_learning_rate),
    (weight_decay, mask),
    matrices,
  )


@_hyperparams.factory()
def adagrad_snsm(
  learning_rate: optax.ScalarOrSchedule,
  b1: chex.Numeric = 0.9,
  eps: chex.Numeric = 1e-6,
  *,
  weight_decay: chex.Numeric = 0.0,
  mask: _adam.Mask = None,
  rank: int = 128,
  gap: int = 200,
  projector: _bases.Projector = 'svd',
  on_refresh: str = 'reset',
  subset_size: int | str | None = 'heuristic',
  square_axis: int = 0,
  matrices: _groups.Matrices = _groups.hidden_matrices,
  other_learning_rate: optax.ScalarOrSchedule | None = None,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """AdaGrad with Subset-Norm, and with momentum in a subspace only.

  **Stored:** as :func:`adamw_snsm`, in whose equations the sums of squares now
  add up, without decay, and no bias is corrected.

  Args:
    learning_rate: see :func:`adagrad_sn`.
    b1: see there.
    eps: see there.
    weight_decay: see there.
    mask: see there.
    rank: see :func:`scale_by_subspace_momentum`.
    gap: see there.
    projector: see there.
    on_refresh: see there.
    subset_size: see :func:`adagrad_sn`.
    square_axis: see there.
    matrices: see there.
    other_learning_rate: see there.
    seed: of what is drawn.

  Returns:
    A transformation.

  Raises:
    ValueError: as :func:`adamw_snsm` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_mp
    >>> params = {'kernel': jnp.ones((1024, 1024))}
    >>> tx = optax_mp.adagrad_snsm(1.0, rank=64, projector='random')
    >>> plan = optax_mp.memory.plan(tx, params, gradients=None)
    >>> print(f'{plan.bytes_per_param - 4:.3f}')
    0.254

  **Caveats:** under ``optax.inject_hyperparams``, ``static_args`` are mask,
  rank, gap, projector, subset_size, square_axis, matrices and seed.
  """
  momentum = _subspace_momentum.scale_by_subspace_momentum(
    b1, rank, gap, projector=projector, on_refresh=on_refresh, seed=seed
  )
  average = _momentum.scale_by_ema(b1, False)
  return _groups.with_rates(
    _accumulated(momentum, eps, subset_size, square_axis),
    _accumulated(average, eps, None, 0),
    _adam.decay_after_step,
    (learning_rate, other_learning_rate),
    (weight_decay, mask),
    matrices,
  )


def _accumulated(momentum, eps, subset_size, square_axis):
  return _subset_norm.scale_by_subset_norm(
    eps=eps,
    momentum=momentum,
    bias_correction=False,
    accumulate=True,
    subset_size=subset_size,
    square_axis=square_axis,
  )
