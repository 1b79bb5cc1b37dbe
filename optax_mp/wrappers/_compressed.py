# SPDX-License-Identifier: Apache-2.0
"""The state of any optimizer, kept in any format."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_mp import formats
from optax_mp.formats import _tree
from optax_mp.wrappers import _common


class CompressedState(NamedTuple):
  """The inner state, its leaves stored as the rule says."""

  inner_state: optax.OptState  # leaves are arrays or formats' NamedTuples
  rng_key: chex.Array  # (2,), uint32: key data for the next step's noise


def compressed(
  inner: optax.GradientTransformation,
  rule: formats.Rule,
  *,
  min_size: int = 4096,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps the state of an optimizer in a compact format between steps.

  **Stored:** each array s of the inner state in the format f that the rule
  gives it, else as it is. One step with gradient g and parameters x is

  .. math::
    u, s' = \mathrm{inner}(g, \mathrm{decode}_f(s), x), \qquad
    s \leftarrow \mathrm{encode}_f(s'),

  with g, s and x in float32 whatever their dtypes are outside, so the update u
  is that of the full-precision s'; what f loses counts from the next step on.

  Args:
    inner: any Optax transformation.
    rule: a format for every large floating-point array of the state; or a
      mapping from state field to format or None, ``{'mu': Split(8)}``; or a
      function ``(path, leaf) -> format or None``. See
      :func:`optax_mp.formats.encode_tree`.
    min_size: arrays with fewer values than this stay as they are, as integers
      do: there is nothing to save, and any array takes 512 bytes on a TPU.
    seed: for formats that round stochastically.

  Returns:
    A transformation whose updates have the dtype that Optax would give them.

  Raises:
    ValueError: if the rule is none; in ``init``, if it names a field that the
      state does not have, or is for no array at all; in ``update``, if state
      and gradients have different structures.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optax_mp
    >>> tx = optax_mp.compressed(optax.adam(1e-3), optax_mp.formats.Split(8))
    >>> params = jnp.ones((64, 64))
    >>> state = tx.init(params)
    >>> updates, state = tx.update(2 * params, state, params)
    >>> mu = state.inner_state[0].mu
    >>> mu.high.dtype, mu.low.dtype, mu.high.nbytes + mu.low.nbytes
    (dtype(bfloat16), dtype('uint8'), 12288)

  **Savings:** Adam's moments take 6 bytes per parameter in ``Split(8)`` and 4
  in ``BFloat16('stochastic')``, instead of 8.

  **Caveats:** nearest rounding to bfloat16 freezes averages with decay 0.999.
  ``optax.tree.map_params`` with further trees needs
  ``is_leaf=formats.is_stored``.

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2022 (states stored small, computed
    with in float32)
  """
  _tree.check_rule(rule)
  _check_min_size(min_size)
  _common.check_seed(seed)
  inner = optax.with_extra_args_support(inner)

  @_common.laid_out
  def build(params):
    state = inner.init(_common.to_float32(params))
    now = _common.next_key(_common.new_key(seed))[1]
    return formats.encode_tree(state, rule, now, min_size=min_size)

  def init_fn(params):
    _check_matches(_template(inner, params), params, rule, min_size)
    return CompressedState(build(params), _common.new_key(seed))

  def update_fn(updates, state, params=None, **extra_args):
    like = _template(inner, updates)
    _tree.flatten_like(
      jax.tree.structure(like), state.inner_state, 'state', 'updates'
    )
    inner_state = formats.decode_tree(
      state.inner_state, like, rule, min_size=min_size
    )
    new_updates, inner_state = inner.update(
      _common.to_float32(updates),
      inner_state,
      None if params is None else _common.to_float32(params),
      **extra_args,
    )
    rng_key, now = _common.next_key(state.rng_key)
    stored = formats.encode_tree(inner_state, rule, now, min_size=min_size)
    new_updates = _cast_like(new_updates, updates, params)
    return new_updates, CompressedState(stored, rng_key)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _template(inner: optax.GradientTransformation, tree: Any) -> Any:
  """Structure, shapes and dtypes of the inner state for float32 parameters."""

  def float32(x):
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    narrow = floating and jnp.finfo(x.dtype).bits < 32
    return jax.ShapeDtypeStruct(x.shape, jnp.float32 if narrow else x.dtype)

  return jax.eval_shape(inner.init, jax.tree.map(float32, tree))


def _cast_like(new_updates: Any, updates: Any, params: Any) -> Any:
  """Updates in the dtype that gradient and parameter promote to."""
  dtypes = jax.tree.map(
    jnp.result_type, updates, updates if params is None else params
  )
  return jax.tree.map(lambda u, dtype: u.astype(dtype), new_updates, dtypes)


def _check_matches(like: Any, params: Any, rule: Any, min_size: int) -> None:
  """Raises a ValueError if the rule does nothing, or part of it does."""
  if not jax.tree.leaves(params):
    return  # `optax.tree.map_params` and empty groups of `optax.partition`
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(like)]
  known = {field for path in paths for field in _tree.fields(path)}
  if isinstance(rule, Mapping) and (unknown := set(rule) - known):
    raise ValueError(
      f'`rule` names the state fields {sorted(unknown)}, but the state has '
      f'{sorted(known)}. Use those names, or a function (path, leaf) -> format.'
    )
  if not any(_tree.leaf_formats(like, rule, min_size)):
    shapes = sorted({str(leaf.shape) for leaf in jax.tree.leaves(like)})
    raise ValueError(
      f'`rule` matches no leaf: got {rule!r} with min_size={min_size} for a '
      f'state with arrays of shape {", ".join(shapes) or "(none)"}. Lower '
      '`min_size`, change the rule, or leave out `compressed`.'
    )


def _check_min_size(min_size: Any) -> None:
  if type(min_size) is not int or min_size < 0:
    raise ValueError(
      f'`min_size` must be a Python int, 0 or more; got {min_size!r}. Under '
      '`optax.inject_hyperparams` name it in `static_args`.'
    )
