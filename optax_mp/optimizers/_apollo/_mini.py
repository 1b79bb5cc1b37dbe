# SPDX-License-Identifier: Apache-2.0
"""APOLLO along one direction."""

import chex
import optax

from optax_mp._core import _hyperparams
from optax_mp.optimizers._apollo import _apollo
from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _bases
from optax_mp.optimizers._core import _groups


@_hyperparams.factory()
def apollo_mini(
  learning_rate: optax.ScalarOrSchedule,
  scale: chex.Numeric = 128.0,
  gap: int = 200,
  *,
  scale_front: bool = False,
  limiter: bool = True,
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  eps: chex.Numeric = 1e-6,
  projector: _bases.Projector = 'random',
  store_projection: bool = False,
  seed: int = 0,
  weight_decay: chex.Numeric = 0.0,
  mask: _adam.Mask = None,
  matrices: _groups.Matrices = _groups.hidden_matrices,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
  """:func:`apollo` along one direction, with one factor for a matrix.

  **Stored:** of a matrix (m, n), in float32, 8 max(m, n) + 4 bytes; of other
  leaves 8 bytes per parameter. Equations and references: see there.

  Args:
    learning_rate: eta, a number or a schedule.
    scale: s.
    gap: how many steps a projection lasts.
    scale_front: for this and all others see :func:`apollo`.
    limiter: whether there is one.
    b1: decay of the first moment.
    b2: decay of the second.
    eps: added to the root of the second.
    projector: makes the projection.
    store_projection: or make it again each step.
    seed: of what is drawn.
    weight_decay: lambda.
    mask: what to decay, see ``optax.adamw``.
    matrices: what APOLLO is for.
    adam_learning_rate: for the rest, if not ``learning_rate``.

  Returns:
    A transformation.

  Raises:
    ValueError: as :func:`apollo` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_mp
    >>> params = {'w': jnp.ones((4096, 4096))}
    >>> tx = optax_mp.apollo_mini(1e-2)
    >>> plan = optax_mp.memory.plan(tx, params, gradients=None)
    >>> print(f'{plan.bytes_per_param - 4:.3f}')
    0.002

  **Caveats:** for a short warm-up the authors recommend ``scale_front=True``.
  Under ``optax.inject_hyperparams``, ``static_args`` are gap, projector, seed,
  mask and matrices.
  """
  return _apollo.apollo(
    learning_rate,
    1,
    gap,
    scale=scale,
    scale_type='tensor',
    scale_front=scale_front,
    limiter=limiter,
    b1=b1,
    b2=b2,
    eps=eps,
    projector=projector,
    store_projection=store_projection,
    seed=seed,
    weight_decay=weight_decay,
    mask=mask,
    matrices=matrices,
    adam_learning_rate=adam_learning_rate,
  )
