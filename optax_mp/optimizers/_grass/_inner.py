# SPDX-License-Identifier: Apache-2.0
"""Any transformation, of a few rows of each matrix."""

from typing import Any, Literal, NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp
import optax

from optax_mp.formats import _base
from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _checks
from optax_mp.optimizers._core import _trees
from optax_mp.optimizers._grass import _rows


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
  rule: _rows.Rule = 'topk',
  replacement: bool = False,
  scale: chex.Numeric = 0.25,
  axis: Literal[-2, -1] | None = None,
  rewarm_steps: int = 0,
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  eps: chex.Numeric = 1e-8,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """The update of :func:`grass`, without its learning rate.

  Args:
    inner: what makes steps of selected rows, without a learning rate; see
      :func:`grass`. None: Adam.
    rank: for this and all others see :func:`grass`.
    gap: steps that rows last.
    rule: how they are chosen.
    replacement: whether a row may be drawn twice.
    scale: multiplies.
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
  _base.check_static(rewarm_steps, 'rewarm_steps')
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

  def choose(updates, state, params, layer):
    index = lax.div(state.count, jnp.int32(gap))
    keys = _trees.leaf_keys(updates, state.rng_key, index, layer)
    indices, rho = rows.choose(updates, keys)
    if params is None:
      own = rows.zeros(updates)
    else:
      own = rows.select(params, indices)
    fresh = indices, rho, inner.init(own)
    # `lax.cond` takes nothing else for what may have had a weak type.
    return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), fresh, state[2:5])

  def update_fn(updates, state, params=None, **extra_args):
    indices, rho, inner_state = lax.cond(
      _trees.refreshes(state.count, gap),
      lambda: choose(updates, state, params, extra_args.get('layer')),
      lambda: tuple(state[2:5]),
    )
    x = rows.select(updates, indices, rho)
    w = None if params is None else rows.select(params, indices)
    x, inner_state = inner.update(x, inner_state, w, **extra_args)
    factor = scale
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
