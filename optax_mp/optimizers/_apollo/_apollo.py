# SPDX-License-Identifier: Apache-2.0
"""The gradient itself, scaled as Adam scales a random projection of it."""

from typing import Any, Literal, NamedTuple

import chex
import jax.numpy as jnp
import optax

from optax_mp._core import _hyperparams
from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _bases
from optax_mp.optimizers._core import _checks
from optax_mp.optimizers._core import _groups
from optax_mp.optimizers._core import _limiter
from optax_mp.optimizers._core import _low_rank


class ScaleByApolloState(NamedTuple):
  """Moments of a projection, and the norm of the scaled gradient."""

  count: chex.Array  # (), int32
  rng_key: Any  # (2,), uint32, where projections are not of an SVD
  mu: optax.Updates  # (..., m, r), of wide leaves (..., r, n), float32
  nu: optax.Updates  # the same
  projector: Any  # (..., r, n), of wide (..., m, r), float32; if stored
  norm: Any  # (...), float32: of S in the step before; 0 if there is none


def scale_by_apollo(
  rank: int = 128,
  gap: int = 200,
  scale: chex.Numeric = 1.0,
  *,
  scale_type: Literal['channel', 'tensor'] = 'channel',
  scale_front: bool = False,
  limiter: bool = True,
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  eps: chex.Numeric = 1e-6,
  projector: _bases.Projector = 'random',
  store_projection: bool = False,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """The scaled gradient of :func:`apollo`, of all leaves with two axes or more.

  Args:
    rank: for this and all others see :func:`apollo`.
    gap: steps that a projection lasts.
    scale: of projected leaves; its root is what counts.
    scale_type: a factor for each row or column, or one.
    scale_front: the order of scale and limiter.
    limiter: whether there is one.
    b1: decay of the first moment.
    b2: decay of the second.
    eps: added to the root of the second.
    projector: makes the projection.
    store_projection: or make it again each step.
    seed: of random projections.

  Returns:
    A transformation.

  Raises:
    ValueError: as :func:`apollo` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_mp import optimizers
    >>> params = {'w': jnp.ones((16, 8))}
    >>> optimizers.scale_by_apollo(rank=1).init(params).mu['w'].shape
    (16, 1)
  """
  _checks.not_negative(scale=scale)
  _checks.one_of(('channel', 'tensor'), scale_type=scale_type)
  if not callable(projector):
    _checks.one_of(('random', 'svd'), projector=projector)
  if projector != 'random' and not store_projection:
    raise ValueError(
      '`store_projection` must be True for what is made of a gradient, which '
      f'is gone at the next step; got {store_projection!r}.'
    )

  def rule(g, x, n, basis, norm):
    del basis
    root = jnp.sqrt(jnp.asarray(scale, jnp.float32))
    s = g * _low_rank.ratios(n, x, g.shape, scale_type == 'channel')
    s = root * s if scale_front else s
    if limiter:
      s, norm = _limiter.limit_growth(s, norm)
    return s if scale_front else root * s, norm

  kept: Any = {'stored': store_projection, 'limited': limiter, 'seed': seed}
  kept |= {'known': ('random', 'svd')}
  return _low_rank.scale_by(
    ScaleByApolloState, rule, rank, gap, (b1, b2, eps), projector, **kept
  )


@_hyperparams.factory()
def apollo(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  gap: int = 200,
  *,
  scale: chex.Numeric = 1.0,
  scale_type: Literal['channel', 'tensor'] = 'channel',
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
  r"""The gradient, scaled as Adam scales a random projection of it.

  **Stored:** of a matrix (m, n), in float32, both moments along r directions of
  its shorter side and a norm: 8 r max(m, n) + 4 bytes; of other leaves 8 bytes
  per parameter. With a step's number t, and every ``gap`` steps P with
  independent normal entries of variance 1/r, (r, n) for m >= n

  .. math::
    x &= G P^T, \quad M \leftarrow b_1 M + (1 - b_1) x, \quad
      V \leftarrow b_2 V + (1 - b_2) x^2 \\
    N &= M / (\sqrt V + \epsilon), \quad
      f_i = \|N_i\| / (\|x_i\| + 10^{-8}) \text{ for each row} \\
    S_i &= f_i G_i, \quad q = \|S\| \\
    L &= \max(q / (p + 10^{-8}), 1.01) / 1.01, \quad
      S \leftarrow S / L, \quad p \leftarrow q / L \\
    A &= \eta \frac{\sqrt{1 - b_2^t}}{1 - b_1^t} \sqrt s\, S, \quad
      u = -A - \eta \lambda (W - A)

  and for m < n (m, r), x = P^T G, with a factor for each column. While p = 0,
  at first, L is 1. Leaves with fewer than two axes have AdamW in this form.

  Args:
    learning_rate: eta, a number or a schedule; the authors' scripts have 0.01.
    rank: r; at most the shorter side of a leaf is used. Fixes shapes.
    gap: how many steps a projection lasts: there is a new one at steps 1,
      gap + 1, 2 gap + 1, ...
    scale: s; its root multiplies.
    scale_type: ``'channel'``, or ``'tensor'`` for one factor, ||N|| over ||x||.
    scale_front: multiplies by the root before the limiter, not behind it.
    limiter: whether there is L.
    b1: decay of M.
    b2: decay of V.
    eps: added to the root of V, before the correction of bias.
    projector: ``'random'``, normal entries as above, where the ``'random'`` of
      :func:`adamw_snsm` is orthonormal; ``'svd'``; or a function of (gradient,
      r, key) that returns P; r is no more than the shorter side.
    store_projection: keep P, 4 r min(m, n) bytes. Else it is drawn again each
      step, which only a random one can be.
    seed: of what is drawn, which differs by leaf, layer and time.
    weight_decay: lambda.
    mask: what to decay, see ``optax.adamw``.
    matrices: a tree of bools, or a function from parameters to one: what APOLLO
      is for; the rest gets AdamW. None: all leaves with two or more axes.
    adam_learning_rate: for that rest, if not ``learning_rate``.

  Returns:
    A transformation.

  Raises:
    ValueError: for a rank, gap, decay, eps or scale out of range, an unknown
      name, a P of another shape, or one that is not random and not stored.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_mp
    >>> params = {'w': jnp.ones((4096, 4096))}
    >>> tx = optax_mp.apollo(1e-2, rank=128)
    >>> plan = optax_mp.memory.plan(tx, params, gradients=None)
    >>> print(f'{plan.bytes_per_param - 4:.3f}')
    0.250

  **Savings:** no decomposition, and two thirds of GaLore's state for a square
  matrix. :func:`apollo_mini` has next to none.

  **Caveats:** ||S|| may grow by 1 % a step, from what it was at first: where
  the first gradient is far below eps / sqrt(1 - b2), as behind a layer that
  starts at zero, S stays tiny for long, and warming up does not help. A step
  without gradient starts p anew. Moments are kept when P changes. Each matrix
  of a stack (L, m, n) has its own p and P, but under ``vmap(tx.init)`` and
  ``vmap(tx.update)`` all layers have the same P, as they have the same key.
  Stacked vectors (L, n) look like a matrix: leave them out of ``matrices``.
  Under ``optax.inject_hyperparams``, ``static_args`` are rank, gap, projector,
  seed, matrices and mask.

  References:
    Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
    <https://arxiv.org/abs/2412.05270>`_, 2024
  """
  adam: Any = {'b1': b1, 'b2': b2, 'eps': eps}
  form: Any = {'scale_type': scale_type, 'scale_front': scale_front}
  form |= {'limiter': limiter, 'projector': projector, 'seed': seed}
  return _low_rank.alias(
    scale_by_apollo(
      rank, gap, scale, store_projection=store_projection, **form, **adam
    ),
    learning_rate,
    (b1, b2, eps),
    weight_decay,
    mask,
    matrices,
    adam_learning_rate,
  )
