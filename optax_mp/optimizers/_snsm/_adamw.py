# SPDX-License-Identifier: Apache-2.0
"""AdamW with Subset-Norm, and with Subspace-Momentum besides."""

import chex
import optax

from optax_mp._core import _hyperparams
from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _bases
from optax_mp.optimizers._core import _groups
from optax_mp.optimizers._core import _low_rank
from optax_mp.optimizers._core import _momentum
from optax_mp.optimizers._snsm import _subset_norm
from optax_mp.optimizers._snsm import _subspace_momentum


@_hyperparams.factory()
def adamw_sn(
  learning_rate: optax.ScalarOrSchedule,
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  *,
  eps: chex.Numeric = 1e-6,
  weight_decay: chex.Numeric = 0.0,
  mask: _adam.Mask = None,
  subset_size: int | str | None = 'heuristic',
  square_axis: int = 0,
  matrices: _groups.Matrices = _groups.hidden_matrices,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""AdamW with one second moment for each row, or column, of a matrix.

  **Stored:** of a matrix (m, n) the momentum and max(m, n) second moments, in
  float32: 4 m n + 4 max(m, n) bytes, a little over 4 per parameter; of other
  leaves 8 per parameter. With S the subsets of coordinates:

  .. math::
    M &\leftarrow b_1 M + (1 - b_1) G, \quad
      v_S \leftarrow b_2 v_S + (1 - b_2) \sum_{i \in S} G_i^2 \\
    A_S &= \eta \frac{\sqrt{1 - b_2^t}}{1 - b_1^t}
      \frac{M_S}{\sqrt{v_S} + \epsilon}, \quad
      u = -A - \eta \lambda (W - A)

  Args:
    learning_rate: eta, a number or a schedule. The sum, not the mean, makes
      steps about the root of a subset's size shorter than Adam's: the authors
      take ten times Adam's learning rate.
    b1: decay of the momentum.
    b2: decay of the second moments.
    eps: added to their roots, before the bias is corrected; larger than 0.
    weight_decay: lambda, of the weights after the step.
    mask: what to decay, see ``optax.adamw``.
    subset_size: ``'heuristic'``: the rows of a matrix with m > n, the columns
      of one with m < n, the single coordinates of a leaf with fewer than two
      axes. An integer k: k neighbours of a matrix, row after row, or of a
      vector; -s: the root of its size over s. Both are lowered to the next
      divisor of the size. On several devices the heuristic leaves matrices
      where they are, runs of neighbours do not.
    square_axis: of square matrices, 0 for rows, -1 for columns: in the order of
      Flax, (in, out), those of an output neuron, as the official code has it in
      PyTorch's.
    matrices: a tree of bools, or a function from parameters to one: what the
      method is for; the rest gets AdamW, moments in float32. None: all leaves,
      of which those with two axes are matrices, stacked biases too. The default
      leaves out the head, which the official code does not.
    adam_learning_rate: for that rest, if not ``learning_rate``, which for it is
      large.

  Returns:
    A transformation.

  Raises:
    ValueError: for a decay outside [0, 1), an eps of 0 or unknown subsets.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_mp
    >>> params = {'kernel': jnp.ones((1024, 1024))}
    >>> tx = optax_mp.adamw_sn(1e-2, adam_learning_rate=1e-3)
    >>> plan = optax_mp.memory.plan(tx, params, gradients=None)
    >>> print(f'{plan.bytes_per_param - 4:.3f}')
    4.004

  **Savings:** half of Adam's state; most of the other half with
  :func:`adamw_snsm`, or with the momentum in 8 bits.

  **Caveats:** a matrix whose size is prime has no subsets of neighbours but
  single coordinates; ``init`` warns where that is large. Leading axes are batch
  axes: a stack (L, m, n) trains as its L layers would apart. Under
  ``optax.inject_hyperparams``, ``static_args`` are mask, subset_size,
  square_axis and matrices.

  References:
    Nguyen and Nguyen, `Lean and Mean Adaptive Optimization via Subset-Norm
    and Subspace-Momentum with Convergence Guarantees
    <https://arxiv.org/abs/2411.07120>`_, 2025
  """
  scale = _subset_norm.scale_by_subset_norm(
    b2,
    eps,
    momentum=_momentum.scale_by_ema(b1, True),
    subset_size=subset_size,
    square_axis=square_axis,
  )
  return _low_rank.alias(
    scale,
    learning_rate,
    (b1, b2, eps),
    weight_decay,
    mask,
    matrices,
    adam_learning_rate,
  )


@_hyperparams.factory()
def adamw_snsm(
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
  subset_size: int | str | None = 'heuristic',
  square_axis: int = 0,
  matrices: _groups.Matrices = _groups.hidden_matrices,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""AdamW with Subset-Norm, and with momentum in a subspace only.

  **Stored:** of a matrix (m, n), in float32: 4 max(m, n) bytes of second
  moments, 4 r max(m, n) of momentum and 4 r min(m, n) of directions, which
  ``'random'`` does without; with ``'topk'`` and ``'uniform'`` 4 max(m, n) +
  4 r min(m, n) + 4 r. Of other leaves 8 per parameter. With P the orthogonal
  projector onto the subspace, and S the subsets of coordinates:

  .. math::
    M &\leftarrow b_1 M + (1 - b_1) P G, \quad N = M + (G - P G), \quad
      v_S \leftarrow b_2 v_S + (1 - b_2) \sum_{i \in S} G_i^2 \\
    A_S &= \eta \frac{\sqrt{1 - b_2^t}}{1 - b_1^t}
      \frac{N_S}{\sqrt{v_S} + \epsilon}, \quad
      u = -A - \eta \lambda (W - A)

  Args:
    learning_rate: eta, a number or a schedule; see :func:`adamw_sn`.
    b1: decay of the momentum.
    b2: decay of the second moments.
    eps: added to their roots, before the bias is corrected; larger than 0.
    weight_decay: lambda, of the weights after the step.
    mask: what to decay, see ``optax.adamw``.
    rank: see :func:`scale_by_subspace_momentum`.
    gap: see there.
    projector: see there.
    on_refresh: see there.
    subset_size: see :func:`adamw_sn`; None is :func:`adamw_sm`.
    square_axis: see :func:`adamw_sn`.
    matrices: see there.
    adam_learning_rate: see there.
    seed: of what is drawn.

  Returns:
    A transformation.

  Raises:
    ValueError: as :func:`scale_by_subspace_momentum` and
      :func:`scale_by_subset_norm` do.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_mp
    >>> params = {'kernel': jnp.ones((1024, 1024))}
    >>> tx = optax_mp.adamw_snsm(1e-2, rank=64, projector='topk')
    >>> plan = optax_mp.memory.plan(tx, params, gradients=None)
    >>> print(f'{plan.bytes_per_param - 4:.3f}')
    0.254

  **Savings:** of a square matrix, (2 r + 1) / (n + 1) of what :func:`adamw_sn`
  stores; about half of that with a selection or ``'random'``.

  **Caveats:** bias is corrected of what has no momentum as well: it is
  multiplied by 10 at the first step with the default b1. Warm up. In a new
  subspace the momentum starts from 0, where the official code uses it once
  more, along the new directions. See :func:`scale_by_subspace_momentum`. Under
  ``optax.inject_hyperparams``, ``static_args`` are mask, rank, gap, projector,
  subset_size, square_axis, matrices and seed.

  References:
    Nguyen and Nguyen, `Lean and Mean Adaptive Optimization via Subset-Norm
    and Subspace-Momentum with Convergence Guarantees
    <https://arxiv.org/abs/2411.07120>`_, 2025
  """
  momentum = _subspace_momentum.scale_by_subspace_momentum(
    b1,
    rank,
    gap,
    projector=projector,
    on_refresh=on_refresh,
    bias_correction=True,
    seed=seed,
  )
  scale = _subset_norm.scale_by_subset_norm(
    b2,
    eps,
    momentum=momentum,
    subset_size=subset_size,
    square_axis=square_axis,
  )
  return _low_rank.alias(
    scale,
    learning_rate,
    (b1, b2, eps),
    weight_decay,
    mask,
    matrices,
    adam_learning_rate,
  )
