# SPDX-License-Identifier: Apache-2.0
"""Grass: training with structured sparse gradients (2406.17660).

Any optimizer on a few rows of each matrix, with new rows now and then.
"""

from typing import Any, Literal, NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp
import optax

from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _checks
from optax_mp.optimizers._core import _groups
from optax_mp.optimizers._core import _rows
from optax_mp.optimizers._core import _trees


class ScaleByGrassState(NamedTuple):
  """Which rows are trained, and the state of an optimizer of those.

  Leaves with fewer than two axes have no rows: theirs is ``others``.
  """

  count: chex.Array  # (), int32
  rng_key: chex.PRNGKey  # (2,), uint32
  indices: Any  # (..., r), int32: of rows or columns
  rho: Any  # (..., r), float32: what they are multiplied by
  inner_state: optax.OptState  # for (..., r, n) or (..., m, r), float32
  others: optax.OptState  # Adam's


def scale_by_grass(
  inner: optax.GradientTransformation | None = None,
  rank: int = 128,
  gap: int = 200,
  *,
  rule: _rows.Rule = 'topr',
  replacement: bool = False,
  alpha: chex.Numeric = 0.25,
  axis: Literal[-2, -1] | None = None,
  rewarm_steps: int = 0,
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  eps: chex.Numeric = 1e-8,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """The update of :func:`grass`, without its learning rate.

  Args:
    inner: any transformation; it sees the selected rows of gradients and
      parameters. None: Adam.
    rank: for this and all others see :func:`grass`.
    gap: steps that rows last.
    rule: how they are chosen.
    replacement: whether a row may be drawn twice.
    alpha: multiplies.
    axis: -2 for rows, -1 for columns.
    rewarm_steps: after each choice.
    b1: Adam's, for vectors at least.
    b2: see there.
    eps: see there.
    seed: of draws.

  Returns:
    A transformation. All leaves with two or more axes are projected.

  Raises:
    ValueError: as :func:`grass` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from optax_mp import optimizers
    >>> params = {'w': jnp.ones((16, 8))}
    >>> tx = optimizers.scale_by_grass(optax.scale_by_lion(), rank=4)
    >>> tx.init(params).inner_state.mu['w'].shape
    (4, 8)
  """
  rows = _rows.Rows(rank, axis, rule, replacement)
  rows.check()
  _checks.whole(gap=gap)
  if rewarm_steps != 0:
    _checks.whole(rewarm_steps=rewarm_steps)
  _checks.decays(b1=b1, b2=b2)
  _checks.positive(eps=eps)
  adam = _adam.scale_by_adam(b1, b2, eps)
  inner = optax.with_extra_args_support(adam if inner is None else inner)

  def init_fn(params):
    count, key = jnp.zeros((), jnp.int32), _trees.raw_key(seed)
    rho = rows.factors(params)
    indices = optax.tree.cast(rho, jnp.int32)
    inner_state = inner.init(rows.zeros(params))
    others = adam.init(_rows.others_of(params))
    return ScaleByGrassState(count, key, indices, rho, inner_state, others)

  def choose(updates, state, layer):
    index = lax.div(state.count, jnp.int32(gap))
    keys = _trees.leaf_keys(updates, state.rng_key, index, layer)
    fresh = *rows.choose(updates, keys), inner.init(rows.zeros(updates))
    # `lax.cond` takes nothing else for what may have had a weak type.
    return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), fresh, state[2:5])

  def update_fn(updates, state, params=None, **extra_args):
    indices, rho, inner_state = lax.cond(
      _trees.refreshes(state.count, gap),
      lambda: choose(updates, state, extra_args.get('layer')),
      lambda: tuple(state[2:5]),
    )
    x = rows.select(updates, indices, rho)
    w = None if params is None else rows.select(params, indices)
    x, inner_state = inner.update(x, inner_state, w, **extra_args)
    factor = alpha
    if rewarm_steps:
      age = lax.rem(state.count, jnp.int32(gap)) + 1
      factor *= jnp.minimum(1.0, age.astype(jnp.float32) / rewarm_steps)
    x = jax.tree.map(lambda x: factor * x, x)
    projected = rows.back(x, updates, indices, rho)
    plain, others = adam.update(_rows.others_of(updates), state.others)
    count = _trees.increment(state.count)
    return _rows.merged(updates, projected, plain), ScaleByGrassState(
      count, state.rng_key, indices, rho, inner_state, others
    )

  return _trees.in_float32(
    optax.GradientTransformationExtraArgs(init_fn, update_fn)
  )


def grass(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  gap: int = 200,
  *,
  inner: optax.GradientTransformation | None = None,
  rule: _rows.Rule = 'topr',
  replacement: bool = False,
  alpha: chex.Numeric = 0.25,
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
    u &= -\eta \alpha \sum_j e_{\sigma_j} \rho_j D_j^T - \eta \lambda W

  ================== ================================= =======================
  rule               rows                              rho
  ================== ================================= =======================
  'topr'             of largest norm                   1
  'multinomial_norm' drawn in proportion to norms, q   1
  'uniform'          drawn, q = 1/m                    1
  the last two, with drawn independently; one that is  :math:`(r q)^{-1/2}`
  ``replacement``    there twice has two states
  ================== ================================= =======================

  Args:
    learning_rate: eta, a number or a schedule.
    rank: r, at most the length of the axis. Fixes shapes.
    gap: how many steps rows last: new ones at steps 1, gap + 1, 2 gap + 1, ...
    inner: any Optax transformation, of a tree of selected rows, ``NOTHING``
      for vectors; None: Adam. It sees rows of the parameters as well.
    rule: see above. Where a gradient is zero, all rows have equal norms.
    replacement: whether rows are drawn with replacement, so that the projection
      and back is the identity on average.
    alpha: multiplies updates of matrices.
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
  weight decay; with 'topr' a row of small gradients may never be. Stacked
  vectors (L, n) look like a matrix: leave them out of ``matrices``.

  References:
    Muhamed et al., `Grass: Compute Efficient Low-Memory LLM Training with
    Structured Sparse Gradients <https://arxiv.org/abs/2406.17660>`_, 2024
  """
  method = scale_by_grass(
    inner,
    rank,
    gap,
    rule=rule,
    replacement=replacement,
    alpha=alpha,
    axis=axis,
    rewarm_steps=rewarm_steps,
    b1=b1,
    b2=b2,
    eps=eps,
    seed=seed,
  )
  own = _groups.own(adam_learning_rate, learning_rate)
  step, own_step = (
    _adam.decay_before_step(rate, weight_decay, mask)
    for rate in (learning_rate, own)
  )
  adam = _adam.scale_by_adam(b1, b2, eps)
  return _groups.alias(method, step, matrices, adam, own_step)
