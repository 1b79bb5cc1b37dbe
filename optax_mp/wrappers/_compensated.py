# SPDX-License-Identifier: Apache-2.0
"""Parameters in 16 bits, what rounding removes in the optimizer's state."""

from typing import Any, NamedTuple
import warnings

import chex
import jax
import jax.numpy as jnp
import optax

from optax_mp.formats import _base
from optax_mp.formats import _boxed
from optax_mp.formats import _containers
from optax_mp.formats import _leaves
from optax_mp.formats import _paths
from optax_mp.wrappers import _common
from optax_mp.wrappers import _conditional
from optax_mp.wrappers import _residual


class CompensatedState(NamedTuple):
  """The inner state and the residuals of the parameters."""

  inner_state: optax.OptState
  # Like params: `Residual(low)`, `NoResidual()`, or EmptyState() for float32.
  residual: chex.ArrayTree
  noise_count: chex.Array  # (), uint32: how often noise was drawn


def compensated(
  inner: optax.GradientTransformation,
  residual_bits: int = 16,
  *,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Trains 16-bit parameters as if they were float32.

  **Stored:** for each bfloat16 or float16 parameter a residual of
  ``residual_bits`` bits: 2, 1 or 0 bytes beside the parameter's 2. float32
  parameters pass through untouched.

  With p the parameter, e its residual, and ``Split`` as the format, one step is

  .. math::
    w &= \mathrm{join}(p, e), \\
    w' &= w + \mathrm{inner}(g, s, w), \\
    p', e' &= \mathrm{split}(w'), \\
    \mathrm{update} &= p' - p \quad\text{(float32)}.

  The inner transformation sees float32 gradients and the float32 weights w, so
  weight decay is compensated too, and everything that changes weights must be
  inside ``inner``: nothing may come after ``compensated`` in a chain.
  ``optax.apply_updates(params, updates)`` lands on p' bit for bit.

  Args:
    inner: any Optax transformation, :func:`compressed` ones among them.
    residual_bits: 16, exact: the same bits as training in float32 (float16: for
      abs(w) from 6.1e-5 to 65504); 8, a master of 24 bits (16 significant),
      stochastically rounded; 0, no residual, stochastically rounded parameters.
    seed: for the stochastic rounding.

  Returns:
    A transformation; its updates for 16-bit parameters are float32.

  Raises:
    ValueError: for other ``residual_bits``; in ``update``, without ``params``,
      or with parameters of other dtypes or structure than in ``init``.

  Warns:
    UserWarning: in ``init``, if no parameter has 16 bits.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optax_mp
    >>> def train(tx, params):
    ...   state = tx.init(params)
    ...   for _ in range(100):
    ...     updates, state = tx.update(jnp.ones_like(params), state, params)
    ...     params = optax.apply_updates(params, updates)
    ...   return params
    >>> weight = jnp.ones((), jnp.bfloat16)
    >>> print(train(optax.sgd(1e-3), weight))
    1
    >>> print(train(optax_mp.compensated(optax.sgd(1e-3)), weight))
    0.898438

  **Savings:** 4 bytes per parameter where a float32 master and its bfloat16
  copy take 6; 3 or 2 with fewer residual bits.

  **Caveats:** where a weight shrinks more than 65536-fold in one step (float16:
  8192-fold), p + (p' - p) may miss p' by a float32 rounding error of p.
  A master too large for the parameter's dtype shows as infinity and does not
  come back. ``optax.value_and_grad_from_state`` wants updates of the gradients'
  dtype: give it float32 gradients. So do Optax's conditional wrappers
  (``optax.apply_if_finite``), which get them: there, a weight that more than
  halves or doubles in a step may land beside itself, by half a bit of it;
  :func:`skip_nonfinite` needs no branch. After
  ``vmap(tx.init)`` every row has the same noise, unless ``update`` is given
  its number as ``layer=``.

  References:
    Lewandowski and Kosson, `Memory Efficient Mixed-Precision Optimizers
    <https://arxiv.org/abs/2309.12381>`_, 2023;
    Zamirai et al., `Revisiting BFloat16 Training
    <https://arxiv.org/abs/2010.06192>`_, 2020
  """
  _base.check_choice(residual_bits, 'residual_bits', (16, 8, 0))
  inner, seed = _common.checked(inner, seed)

  @_common.laid_out
  def build(params):
    residual = jax.tree.map(
      lambda p: _residual.no_error(p, residual_bits), params
    )
    with _leaves.named_on_failure(params, 'params'):
      return inner.init(_common.to_float32(params)), residual

  def init_fn(params):
    params = _leaves.checked(params, 'params')
    _check_halves(params)
    inner_state, residual = build(params)
    return CompensatedState(inner_state, residual, jnp.zeros((), jnp.uint32))

  def step(path, param, weight, delta, key):
    format = _residual.format_of(param.dtype, residual_bits)
    if format is None:
      return delta, optax.EmptyState()
    key = _paths.leaf_key(key, path, 'params')
    # Added as `optax.apply_updates` adds: bit for bit what float32 gets.
    weight = (weight + delta).astype(weight.dtype)
    return _residual.step(format, param, weight, key)

  def update_fn(updates, state, params=None, **extra_args):
    _common.check_state(state, CompensatedState)
    _check_params(params)
    updates, params = _leaves.checked_updates(updates, params)
    paths, leaves, residuals, treedef = _flatten(state, params, residual_bits)
    _leaves.check_shapes(updates, params)
    given = treedef.flatten_up_to(state.residual)
    weights = list(map(_residual.join, leaves, residuals))
    with _leaves.named_on_failure(updates, 'updates'):
      deltas, inner_state = inner.update(
        _common.to_float32(updates),
        state.inner_state,
        treedef.unflatten(weights),
        **extra_args,
      )
    inner_state = _leaves.cast_like(inner_state, state.inner_state)
    layer = extra_args.get('layer')
    now = _common.noise_key(seed, state.noise_count, layer)
    pairs = [
      step(path, p, w, d, now)
      for path, p, w, d in zip(
        paths, leaves, weights, treedef.flatten_up_to(deltas), strict=True
      )
    ]
    new_updates = treedef.unflatten(update for update, _ in pairs)
    new_updates = _conditional.as_asked_for(updates, params, new_updates)
    residual = treedef.unflatten(
      _containers.contained(new, old)
      for (_, new), old in zip(pairs, given, strict=True)
    )
    count = state.noise_count + 1
    return new_updates, CompensatedState(inner_state, residual, count)

  tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
  return _boxed.transparent(tx)


def _check_params(params: Any) -> None:
  if params is None:
    raise ValueError(
      '`params` is None, but `compensated` joins the parameters with their '
      'residuals. Call `update(updates, state, params)`.'
    )


def _flatten(state: Any, params: Any, residual_bits: int):
  """Paths and leaves of the parameters, and their residuals, once they fit."""
  pairs, treedef = jax.tree_util.tree_flatten_with_path(params)
  paths, leaves = [path for path, _ in pairs], [leaf for _, leaf in pairs]
  residuals = _paths.flatten_like(
    treedef, state.residual, 'state', 'params', _paths.OTHER_PARAMS
  )
  residuals = [
    _residual.fitting(path, leaf, residual, residual_bits)
    for path, leaf, residual in zip(paths, leaves, residuals, strict=True)
  ]
  return paths, leaves, residuals, treedef


def _check_halves(params: Any) -> None:
  """Says so if there is nothing to compensate."""
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(params)}
  if dtypes and not any(_residual.format_of(dtype, 0) for dtype in dtypes):
    warnings.warn(
      '`compensated` does nothing: got `params` without a bfloat16 or float16 '
      f'leaf, only {sorted(map(str, dtypes))}. Cast the parameters, or leave '
      'out `compensated`; inside another wrapper of this library it sees '
      'float32 and belongs outside.',
      stacklevel=3,
    )
