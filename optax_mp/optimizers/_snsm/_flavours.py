# SPDX-License-Identifier: Apache-2.0
"""One of the two by itself, in the manner of Adam, RMSProp and SGD."""

import chex
import optax

from optax_mp._core import _hyperparams
from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _bases
from optax_mp.optimizers._core import _groups
from optax_mp.optimizers._core import _momentum
from optax_mp.optimizers._snsm import _adamw
from optax_mp.optimizers._snsm import _subset_norm
from optax_mp.optimizers._snsm import _subspace_momentum


@_hyperparams.factory()
def adamw_sm(
  learning_rate: optax.ScalarOrSchedule,
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  *,
  eps: chex.Numeric = 1e-6,
  weight_decay: chex.Numeric = 0.0,
  mask: _adam.Mask = None,
  rank: int = 128,
  gap: int = 200,
  projector: _bases.Projector = 'svd',
  on_refresh: str = 'reset',
  matrices: _groups.Matrices = _groups.hidden_matrices,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """AdamW with momentum in a subspace only.

  **Stored:** of a matrix 4 bytes per parameter, and in place of a momentum what
  :func:`scale_by_subspace_momentum` says.

  Args:
    learning_rate: see :func:`adamw_snsm`, but about that of Adam.
    b1: see there.
    b2: see there.
    eps: see there.
    weight_decay: see there.
    mask: see there.
    rank: see there.
    gap: see there.
    projector: see there.
    on_refresh: see there.
    matrices: see there.
    adam_learning_rate: see there.
    seed: see there.

  Returns:
    A transformation.

  Raises:
    ValueError: as :func:`adamw_snsm` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_mp
    >>> params = {'kernel': jnp.ones((1024, 1024))}
    >>> tx = optax_mp.adamw_sm(1e-3, rank=64)
    >>> plan = optax_mp.memory.plan(tx, params, gradients=None)
    >>> print(f'{plan.bytes_per_param - 4:.3f}')
    4.500

  **Caveats:** under ``optax.inject_hyperparams``, ``static_args`` are mask,
  rank, gap, projector, matrices and seed.
  """
  return _adamw.adamw_snsm(
    learning_rate,
    b1,
    b2,
    eps=eps,
    weight_decay=weight_decay,
    mask=mask,
    rank=rank,
    gap=gap,
    projector=projector,
    on_refresh=on_refresh,
    subset_size=None,
    matrices=matrices,
    adam_learning_rate=adam_learning_rate,
    seed=seed,
  )


@_hyperparams.factory()
def rmsprop_sn(
  learning_rate: optax.ScalarOrSchedule,
  b2: chex.Numeric = 0.999,
  eps: chex.Numeric = 1e-6,
  *,
  weight_decay: chex.Numeric = 0.0,
  mask: _adam.Mask = None,
  subset_size: int | str | None = 'heuristic',
  square_axis: int = 0,
  matrices: _groups.Matrices = _groups.hidden_matrices,
  other_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
  """RMSProp with Subset-Norm: no momentum, no correction of bias.

  **Stored:** of a matrix (m, n) 4 max(m, n) bytes, which is next to nothing; of
  other leaves 4 per parameter.

  Args:
    learning_rate: see :func:`adamw_sn`.
    b2: see there.
    eps: see there.
    weight_decay: see there.
    mask: see there.
    subset_size: see there.
    square_axis: see there.
    matrices: see there; the rest gets RMSProp.
    other_learning_rate: for that rest, if not ``learning_rate``.

  Returns:
    A transformation.

  Raises:
    ValueError: as :func:`scale_by_subset_norm` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_mp
    >>> params = {'kernel': jnp.ones((1024, 1024))}
    >>> tx = optax_mp.rmsprop_sn(1e-2)
    >>> plan = optax_mp.memory.plan(tx, params, gradients=None)
    >>> print(f'{plan.bytes_per_param - 4:.3f}')
    0.004

  **Caveats:** the first steps are 1 / sqrt(1 - b2) times as long as with a
  correction of bias, 32 times with the default. Warm up. Under
  ``optax.inject_hyperparams``, ``static_args`` are mask, subset_size,
  square_axis and matrices.
  """

  def scale(subset_size, square_axis):
    return _subset_norm.scale_by_subset_norm(
      b2,
      eps,
      bias_correction=False,
      subset_size=subset_size,
      square_axis=square_axis,
    )

  return _groups.with_rates(
    scale(subset_size, square_axis),
    scale(None, 0),
    _adam.decay_after_step,
    (learning_rate, other_learning_rate),
    (weight_decay, mask),
    matrices,
  )


@_hyperparams.factory()
def sgd_sm(
  learning_rate: optax.ScalarOrSchedule,
  b1: chex.Numeric = 0.9,
  rank: int = 128,
  *,
  gap: int = 200,
  projector: _bases.Projector = 'svd',
  on_refresh: str = 'reset',
  weight_decay: chex.Numeric = 0.0,
  mask: _adam.Mask = None,
  matrices: _groups.Matrices = _groups.hidden_matrices,
  other_learning_rate: optax.ScalarOrSchedule | None = None,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """SGD with momentum in a subspace only.

  **Stored:** what :func:`scale_by_subspace_momentum` says.

  Args:
    learning_rate: a number or a schedule.
    b1: decay of the momentum, an average: a step is (1 - b1) times as long as
      that of ``optax.sgd`` with the same learning rate and momentum.
    rank: see :func:`scale_by_subspace_momentum`.
    gap: see there.
    projector: see there.
    on_refresh: see there.
    weight_decay: of the weights after the step.
    mask: what to decay, see ``optax.adamw``.
    matrices: see :func:`adamw_sn`; the rest gets SGD with momentum.
    other_learning_rate: for that rest, if not ``learning_rate``.
    seed: of what is drawn.

  Returns:
    A transformation.

  Raises:
    ValueError: as :func:`scale_by_subspace_momentum` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_mp
    >>> params = {'kernel': jnp.ones((1024, 1024))}
    >>> tx = optax_mp.sgd_sm(0.1, rank=64, projector='random')
    >>> plan = optax_mp.memory.plan(tx, params, gradients=None)
    >>> print(f'{plan.bytes_per_param - 4:.3f}')
    0.250

  **Caveats:** under ``optax.inject_hyperparams``, ``static_args`` are rank,
  gap, projector, mask, matrices and seed.
  """
  method = _subspace_momentum.scale_by_subspace_momentum(
    b1, rank, gap, projector=projector, on_refresh=on_refresh, seed=seed
  )
  return _groups.with_rates(
    method,
    _momentum.scale_by_ema(b1, False),
    _adam.decay_after_step,
    (learning_rate, other_learning_rate),
    (weight_decay, mask),
    matrices,
  )
