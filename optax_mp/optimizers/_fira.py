# SPDX-License-Identifier: Apache-2.0
"""Fira: full-rank training under a low-rank constraint (2410.01623).

GaLore, and what it leaves out goes along, scaled as Adam scales the rest.
"""

from typing import Any, NamedTuple

import chex
import optax

from optax_mp._core import _hyperparams
from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _bases
from optax_mp.optimizers._core import _groups
from optax_mp.optimizers._core import _limiter
from optax_mp.optimizers._core import _low_rank


class ScaleByFiraState(NamedTuple):
  """Moments in a subspace, its basis, and the norm of what is outside.

  Leaves that are not projected have whole moments and neither of the others.
  """

  count: chex.Array  # (), int32
  rng_key: Any  # (2,), uint32, where a function makes the basis
  mu: optax.Updates  # (..., m, r), of wide leaves (..., r, n), float32
  nu: optax.Updates  # the same
  projector: Any  # (..., r, n), of wide leaves (..., m, r), float32
  norm: Any  # (...), float32: of S in the step before; 0 if there is none


def scale_by_fira(
  rank: int = 128,
  gap: int = 200,
  scale: chex.Numeric = 0.25,
  *,
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  eps: chex.Numeric = 1e-6,
  exact_complement: bool = False,
  projector: _bases.Projector = 'svd',
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """The scaled step of :func:`fira`, without its learning rate.

  Args:
    rank: for this and all others see :func:`fira`.
    gap: steps that a basis lasts.
    scale: of what is in the subspace.
    b1: decay of the first moment.
    b2: decay of the second.
    eps: added to the root of the second.
    exact_complement: or what is left after ``scale`` of the projection.
    projector: makes the basis.
    seed: of the keys that it gets.

  Returns:
    A transformation. All leaves with two or more axes are projected.

  Raises:
    ValueError: as :func:`fira` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_mp import optimizers
    >>> params = {'layers': jnp.ones((3, 16, 8))}
    >>> state = optimizers.scale_by_fira(rank=4).init(params)
    >>> state.norm['layers'].shape
    (3,)
  """

  def rule(g, x, n, basis, norm):
    inside = _bases.back(x, basis, g)
    outside = g - (inside if exact_complement else scale * inside)
    scaled = outside * _low_rank.ratios(n, x, g.shape)
    scaled, norm = _limiter.limit_growth(scaled, norm)
    return scale * _bases.back(n, basis, g) + scaled, norm

  return _low_rank.scale_by(
    ScaleByFiraState, rule, rank, gap, (b1, b2, eps), projector, seed=seed
  )


@_hyperparams.factory()
def fira(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  gap: int = 200,
  *,
  scale: chex.Numeric = 0.25,
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  eps: chex.Numeric = 1e-6,
  exact_complement: bool = False,
  projector: _bases.Projector = 'svd',
  seed: int = 0,
  weight_decay: chex.Numeric = 0.0,
  mask: _adam.Mask = None,
  matrices: _groups.Matrices = _groups.hidden_matrices,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""GaLore, and the rest of the gradient scaled as Adam scales what it has.

  **Stored:** of a matrix (m, n), in float32, both moments along r directions of
  its shorter side, those directions and a norm:
  4 r (2 max(m, n) + min(m, n)) + 4 bytes; of other leaves 8 bytes per
  parameter. With a step's number t, and every ``gap`` steps P from the singular
  value decomposition of G, for m >= n its first r right singular vectors (r, n)

  .. math::
    x &= G P^T, \quad M \leftarrow b_1 M + (1 - b_1) x, \quad
      V \leftarrow b_2 V + (1 - b_2) x^2 \\
    N &= M / (\sqrt V + \epsilon), \quad
      f_i = \|N_i\| / (\|x_i\| + 10^{-8}) \text{ for each row} \\
    S_i &= f_i (G - \alpha\, x P)_i, \quad q = \|S\| \\
    L &= \max(q / (p + 10^{-8}), 1.01) / 1.01, \quad
      S \leftarrow S / L, \quad p \leftarrow q / L \\
    A &= \eta \frac{\sqrt{1 - b_2^t}}{1 - b_1^t} (\alpha N P + S), \quad
      u = -A - \eta \lambda (W - A)

  and for m < n the left ones (m, r), x = P^T G, with a factor for each column.
  While p = 0, at first, L is 1. Leaves with fewer than two axes have AdamW in
  this form.

  Args:
    learning_rate: eta, a number or a schedule; the authors' example has 0.01,
      and 1e-4 for fine-tuning.
    rank: r; at most the shorter side of a leaf is used. Fixes shapes.
    gap: how many steps a basis lasts: it is made at steps 1, gap + 1,
      2 gap + 1, ...
    scale: alpha.
    b1: decay of M.
    b2: decay of V.
    eps: added to the root of V, before the correction of bias.
    exact_complement: S from G - x P, what is orthogonal to the subspace. The
      official code takes alpha x P away, and so leaves the larger part of the
      gradient inside the subspace in S; so does the default.
    projector: ``'svd'``, or a function of (gradient, r, key) that returns P,
      for cheaper decompositions: (..., r, n) for a gradient (..., m, n) with
      m >= n, else (..., m, r); r is no more than the shorter side.
    seed: of the keys for such a function, one for each leaf and time.
    weight_decay: lambda.
    mask: what to decay, see ``optax.adamw``.
    matrices: a tree of bools, or a function from parameters to one, such as
      :func:`hidden_matrices`: what Fira is for; the rest gets AdamW, moments in
      float32. None: all leaves with two or more axes.
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
    >>> tx = optax_mp.fira(1e-2, rank=128)
    >>> plan = optax_mp.memory.plan(tx, params, gradients=None)
    >>> print(f'{plan.bytes_per_param - 4:.3f}')
    0.375

  **Savings:** GaLore's, with an update of full rank.

  **Caveats:** ||S|| may grow by 1 % a step, from what it was at first: where
  the first gradient is far below eps / sqrt(1 - b2), as behind a layer that
  starts at zero, S stays tiny for long, and warming up the learning rate does
  not help. A step without gradient starts p anew. Of a stack (L, m, n) each
  matrix has its own p and P. As in :func:`galore`, moments are kept when the
  basis changes, steps then depend on signs of singular vectors, and under
  ``vmap`` with a counter per layer every step makes a decomposition. Stacked
  vectors (L, n) look like a matrix: leave them out of ``matrices``. Under
  ``optax.inject_hyperparams``, ``static_args`` are rank, gap, projector, seed,
  matrices and mask.

  References:
    Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under
    Low-rank Constraint? <https://arxiv.org/abs/2410.01623>`_, 2024
  """
  own: Any = {'exact_complement': exact_complement, 'projector': projector}
  own |= {'seed': seed}
  return _low_rank.alias(
    scale_by_fira(rank, gap, scale, b1=b1, b2=b2, eps=eps, **own),
    learning_rate,
    (b1, b2, eps),
    weight_decay,
    mask,
    matrices,
    adam_learning_rate,
  )
