# SPDX-License-Identifier: Apache-2.0
"""Grass: training with structured sparse gradients (2406.17660).

Any optimizer on a few rows of each matrix, with new rows now and then.
"""

from typing import Literal

import chex
import optax

from optax_mp._core import _hyperparams
from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _groups
from optax_mp.optimizers._grass import _inner
from optax_mp.optimizers._grass import _rows


@_hyperparams.factory()
def grass(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  gap: int = 200,
  *,
  inner: optax.GradientTransformation | None = None,
  rule: _rows.Rule = 'topk',
  replacement: bool = False,
  scale: chex.Numeric = 0.25,
  axis: Literal[-2, -1] | None = None,
  rewarm_steps: int = 0,
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  eps: chex.Numeric = 1e-8,
  seed: int = 0,
  weight_decay: chex.Numeric = 0.0,
  mask: _adam.Mask = None,
  matrices: _groups.Matrices = _groups.hidden_matrices,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Any optimizer, on r rows of each matrix that are chosen now and then.

  **Stored:** of a matrix (m, n) r indices, r factors and Adam's moments of r
  rows of the longer side, in float32: 8 r min(m, n) + 8 r bytes; of other
  leaves 8 bytes per parameter. Every ``gap`` steps there are new rows, and the
  inner optimizer starts anew: its moments are zero, its steps t count from 1.

  .. math::
    \sigma, \rho &\leftarrow \mathrm{choose}(G), \quad
      M, V, t \leftarrow 0 \\
    x_j &= \rho_j G_{\sigma_j}, \quad D = \mathrm{inner}(x) \\
    u &= -\eta s \sum_j e_{\sigma_j} \rho_j D_j^T - \eta \lambda W

  ================== ================================= =======================
  rule               rows                              rho
  ================== ================================= =======================
  'topk'             of largest norm                   1
  'multinomial_norm' drawn in proportion to norms, q   1
  'uniform'          drawn, q = 1/m                    1
  the last two, with drawn independently; one that is  :math:`(r q)^{-1/2}`
  ``replacement``    there twice has two states
  ================== ================================= =======================

  Args:
    learning_rate: eta, a number or a schedule.
    rank: r, at most the length of the axis. Fixes shapes.
    gap: how many steps rows last: new ones at steps 1, gap + 1, 2 gap + 1, ...
    inner: an Optax transformation without a learning rate, ``scale_by_*`` for
      example, of a tree of selected rows, ``NOTHING`` for vectors: what it
      returns is multiplied by -eta s, so that a whole optimizer would climb.
      It sees the same rows of the parameters, its ``init`` those of the step
      that chose them, if ``update`` is given parameters. None: Adam.
    rule: see above. Where a gradient is zero, all rows have equal norms.
    replacement: whether rows are drawn with replacement, so that the projection
      and back is the identity on average.
    scale: s, multiplies updates of matrices.
    axis: -2 for rows, -1 for columns; None: the longer of the last two axes, of
      equal ones rows. The shorter one costs more.
    rewarm_steps: after each choice updates are multiplied by min(1, t / this);
      0: not.
    b1: decay of Adam's first moment.
    b2: decay of its second.
    eps: added to the root of that.
    seed: of draws, which differ by leaf, matrix of a stack, layer and choice.
    weight_decay: lambda, of all rows.
    mask: what to decay, see ``optax.adamw``.
    matrices: a tree of bools, or a function from parameters to one, such as
      :func:`hidden_matrices`: what Grass is for; the rest gets AdamW, moments
      in float32. None: all leaves with two or more axes.
    adam_learning_rate: for that rest, if not ``learning_rate``.

  Returns:
    A transformation.

  Raises:
    ValueError: for a rank or gap below 1, an unknown rule or axis, replacement
      without a draw, a decay outside [0, 1) or an eps of 0.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_mp
    >>> params = {'w': jnp.ones((11008, 4096))}
    >>> tx = optax_mp.grass(1e-2, rank=128)
    >>> plan = optax_mp.memory.plan(tx, params, gradients=None)
    >>> print(f'{plan.bytes_per_param - 4:.3f}')
    0.093

  **Savings:** of the state only, here: the gradient comes whole. There is no
  decomposition and no matrix product.

  **Caveats:** there was no code of the authors to compare with, and defaults
  are those of GaLore: tune them. Rows that are not chosen do not move, but for
  weight decay; with 'topk' a row of small gradients may never be. Stacked
  vectors (L, n) look like a matrix: leave them out of ``matrices``. Under
  ``optax.inject_hyperparams``, ``static_args`` are rank, gap, axis,
  rewarm_steps, seed, matrices and mask.

  References:
    Muhamed et al., `Grass: Compute Efficient Low-Memory LLM Training with
    Structured Sparse Gradients <https://arxiv.org/abs/2406.17660>`_, 2024
  """
  method = _inner.scale_by_grass(
    inner,
    rank,
    gap,
    rule=rule,
    replacement=replacement,
    scale=scale,
    axis=axis,
    rewarm_steps=rewarm_steps,
    b1=b1,
    b2=b2,
    eps=eps,
    seed=seed,
  )
  return _groups.with_rates(
    method,
    _adam.scale_by_adam(b1, b2, eps),
    _adam.decay_before_step,
    (learning_rate, adam_learning_rate),
    (weight_decay, mask),
    matrices,
  )
