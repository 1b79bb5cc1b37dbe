# SPDX-License-Identifier: Apache-2.0
"""GaLore: Training by Gradient Low-Rank Projection (2403.03507).

Adam along a few singular directions of the gradient, nothing along the others.
"""

from typing import Any, NamedTuple

import chex
import optax

from optax_mp._core import _hyperparams
from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _bases
from optax_mp.optimizers._core import _groups
from optax_mp.optimizers._core import _low_rank


class ScaleByGaloreState(NamedTuple):
  """Moments in a subspace, and its basis.

  Leaves that are not projected have whole moments and no basis.
  """

  count: chex.Array  # (), int32
  rng_key: Any  # (2,), uint32, where a function makes the basis
  mu: optax.Updates  # (..., m, r), of wide leaves (..., r, n), float32
  nu: optax.Updates  # the same
  projector: Any  # (..., r, n), of wide leaves (..., m, r), float32


def scale_by_galore(
  rank: int = 128,
  gap: int = 200,
  scale: chex.Numeric = 0.25,
  *,
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  eps: chex.Numeric = 1e-6,
  projector: _bases.Projector = 'svd',
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """The scaled step of :func:`galore`, without its learning rate.

  Args:
    rank: for this and all others see :func:`galore`.
    gap: steps that a basis lasts.
    scale: of projected leaves.
    b1: decay of the first moment.
    b2: decay of the second.
    eps: added to the root of the second.
    projector: makes the basis.
    seed: of the keys that it gets.

  Returns:
    A transformation. All leaves with two or more axes are projected.

  Raises:
    ValueError: as :func:`galore` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_mp import optimizers
    >>> params = {'tall': jnp.ones((16, 8)), 'wide': jnp.ones((8, 16))}
    >>> state = optimizers.scale_by_galore(rank=4).init(params)
    >>> state.mu['tall'].shape, state.projector['tall'].shape
    ((16, 4), (4, 8))
    >>> state.mu['wide'].shape, state.projector['wide'].shape
    ((4, 16), (8, 4))
  """

  def rule(g, x, n, basis, norm):
    del x
    return scale * _bases.back(n, basis, g), norm

  return _low_rank.scale_by(
    ScaleByGaloreState, rule, rank, gap, (b1, b2, eps), projector, seed=seed
  )


@_hyperparams.factory()
def galore(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  gap: int = 200,
  *,
  scale: chex.Numeric = 0.25,
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  eps: chex.Numeric = 1e-6,
  projector: _bases.Projector = 'svd',
  seed: int = 0,
  weight_decay: chex.Numeric = 0.0,
  mask: _adam.Mask = None,
  matrices: _groups.Matrices = _groups.hidden_matrices,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adam along a few singular directions of the gradient, and nowhere else.

  **Stored:** of a matrix (m, n), in float32, both moments along r directions of
  its shorter side and those directions: 4 r (2 max(m, n) + min(m, n)) bytes; of
  other leaves 8 bytes per parameter. With a step's number t, and every ``gap``
  steps P from the singular value decomposition of G, for m >= n its first r
  right singular vectors (r, n)

  .. math::
    x &= G P^T \\
    M &\leftarrow b_1 M + (1 - b_1) x, \quad
      V \leftarrow b_2 V + (1 - b_2) x^2 \\
    D &= \frac{\sqrt{1 - b_2^t}}{1 - b_1^t} \frac{M}{\sqrt V + \epsilon}, \quad
      A = \eta\, s\, D P \\
    u &= -A - \eta \lambda (W - A)

  and for m < n the left ones (m, r): x = P^T G, A = eta s P D. Leaves with
  fewer than two axes have x = G and A = eta D.

  Args:
    learning_rate: eta, a number or a schedule; the authors' scripts have 0.01.
    rank: r; at most the shorter side of a leaf is used. Fixes shapes.
    gap: how many steps a basis lasts: it is made at steps 1, gap + 1,
      2 gap + 1, ...
    scale: s, for projected leaves.
    b1: decay of M.
    b2: decay of V.
    eps: added to the root of V, before the correction of bias.
    projector: ``'svd'``, or a function of (gradient, r, key) that returns P,
      for cheaper decompositions: (..., r, n) for a gradient (..., m, n) with
      m >= n, else (..., m, r); r is no more than the shorter side.
    seed: of the keys for such a function, one for each leaf and time.
    weight_decay: lambda.
    mask: what to decay, see ``optax.adamw``.
    matrices: a tree of bools, or a function from parameters to one, such as
      :func:`hidden_matrices`: what GaLore is for; the rest gets AdamW, moments
      in float32. None: all leaves with two or more axes.
    adam_learning_rate: for that rest, if not ``learning_rate``.

  Returns:
    A transformation.

  Raises:
    ValueError: for a rank or gap below 1, a decay outside [0, 1), an eps of 0,
      or a projector that is unknown or makes arrays of another shape.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_mp
    >>> params = {'w': jnp.ones((4096, 4096))}
    >>> tx = optax_mp.galore(1e-2, rank=128)
    >>> plan = optax_mp.memory.plan(tx, params, gradients=None)
    >>> print(f'{plan.bytes_per_param - 4:.3f}')
    0.375

  **Savings:** at rank 128 a matrix of 4096 x 4096 has 0.375 bytes of state per
  parameter, where Adam has 8.

  **Caveats:** the moments are kept when the basis changes, as in the official
  code, although they then belong to other directions. From the second basis on
  steps therefore depend on the signs of singular vectors, which no two
  libraries agree on. The compiled step has room for a decomposition even on
  steps that make none, and under ``vmap`` with a counter per layer it makes
  one on every step: give it the stack (L, m, n) instead. Leading axes are batch
  axes, so stacked vectors (L, n) look like a matrix: leave them out of
  ``matrices``. Under ``optax.inject_hyperparams``, ``static_args`` are rank,
  gap, projector, seed, matrices and mask.

  ``optax.contrib.galore`` differs: it projects the longer side, so its moments
  are 2 r min(m, n) and its basis is r max(m, n); eps is added after the
  correction of bias; weights decay as they are before the step; ``scale`` is 1
  unless given; leaves with more than two axes are not projected unless told;
  and state has the parameters' dtype.

  References:
    Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
    Projection <https://arxiv.org/abs/2403.03507>`_, 2024
  """
  adam: Any = {'b1': b1, 'b2': b2, 'eps': eps}
  return _low_rank.alias(
    scale_by_galore(rank, gap, scale, **adam, projector=projector, seed=seed),
    learning_rate,
    (b1, b2, eps),
    weight_decay,
    mask,
    matrices,
    adam_learning_rate,
  )
