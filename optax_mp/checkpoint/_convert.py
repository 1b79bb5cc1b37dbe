# SPDX-License-Identifier: Apache-2.0
"""Converts states between transformations that wrap the same optimizer."""

from typing import Any

import jax
import optax

from optax_mp._core import _boxes
from optax_mp.checkpoint import _float32
from optax_mp.checkpoint import _plain
from optax_mp.checkpoint import _weights
from optax_mp.formats import _boxed
from optax_mp.formats import _layout
from optax_mp.formats import _leaves


def to_optax(
  tx: optax.GradientTransformation, state: Any, params: optax.Params
) -> Any:
  """Gives the state that Optax would have without this library's wrappers.

  Take it to leave this library, to look at moments as float32 arrays, or to
  compare two runs. To change formats, take :func:`convert`, which never holds
  the whole state in float32.

  Args:
    tx: the transformation that made ``state``.
    state: its state.
    params: the parameters in training, or their shapes and dtypes.

  Returns:
    The state of the transformation inside :func:`compensated` and
    :func:`compressed`, with all stored arrays decoded to float32. It has no
    residuals of parameters: :func:`to_float32` adds them to the parameters.

  Raises:
    ValueError: if ``tx`` did not make ``state``.

  Examples:
    >>> import jax.numpy as jnp, optax_mp
    >>> params = {'w': jnp.ones((64, 128), jnp.bfloat16)}
    >>> tx = optax_mp.adamw_8bit(1e-3)
    >>> _, state = tx.update(params, tx.init(params), params)
    >>> plain = optax_mp.checkpoint.to_optax(tx, state, params)
    >>> print(type(plain[0]).__name__, plain[0].mu['w'].dtype)
    ScaleByAdamState float32
  """
  bare = _leaves.checked(_boxes.unbox(params), 'params')
  plain = _plain.leaves(_plain.spec(tx, bare), _boxes.unbox(state))
  plain = jax.tree.map(lambda leaf: leaf.read(), plain)
  return _boxed.box_state(plain, params)


def from_optax(
  tx: optax.GradientTransformation, plain_state: Any, params: optax.Params
) -> Any:
  """Turns a plain Optax state into a state of ``tx``.

  Take it to continue a run of plain Optax, if the parameters already have their
  final dtype. :func:`convert` also cuts float32 parameters to 16 bits.

  Args:
    tx: a transformation of this library.
    plain_state: the state of the Optax transformation that ``tx`` wraps.
    params: the parameters that ``tx`` will train, in their final dtype.

  Returns:
    A state of ``tx``. The residuals of 16-bit parameters are zeros, as after
    ``tx.init(params)``.

  Raises:
    ValueError: if ``plain_state`` is not a state of the optimizer in ``tx``.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_mp
    >>> params = {'w': jnp.ones((64, 128), jnp.bfloat16)}
    >>> plain = optax.adamw(1e-3).init({'w': jnp.ones((64, 128))})
    >>> tx = optax_mp.adamw_8bit(1e-3)
    >>> state = optax_mp.checkpoint.from_optax(tx, plain, params)
    >>> print(state.inner_state.inner_state[0].mu['w'].codes.dtype)
    int8
  """
  bare = _leaves.checked(_boxes.unbox(params), 'params')
  plain = jax.tree.map(_plain.Leaf, _boxes.unbox(plain_state))
  spec = _plain.spec(tx, bare)
  spec = _float32.with_residuals(spec, _weights.no_errors(bare, spec))
  state = _plain.wrapped(spec, _plain.placed(plain, bare))
  return _boxed.box_state(_layout.lay_out(state, bare), params)


def convert(
  old_tx: optax.GradientTransformation,
  new_tx: optax.GradientTransformation,
  state: Any,
  params: optax.Params,
  dtype: Any = None,
) -> tuple[optax.Params, Any]:
  """Continues a run with another recipe, format or residual width.

  Take it for a checkpoint that another recipe saved (8 -> 4 bits), after a
  change of a setting that decides a format (16 -> 8 residual bits), and in the
  middle of a run (``optax.adamw`` -> ``adamw_8bit``). Arrays are decoded and
  stored again one at a time, so the whole state never exists in float32.

  Args:
    old_tx: the transformation that made ``state``, of this library or of Optax.
    new_tx: the transformation to continue with, around the same optimizer.
    state: the state of ``old_tx``.
    params: the parameters in training; they must be arrays.
    dtype: the dtype of the new parameters, or a tree of dtypes, as in
      :func:`from_float32`. With None, each parameter keeps its dtype.

  Returns:
    ``(params, state)`` to continue with ``new_tx``. Parameters and residuals
    together hold the same float32 weights as before, rounded to nearest if the
    new residual has fewer bits.

  Raises:
    ValueError: if the optimizers inside differ, if ``old_tx`` did not make
      ``state``, or if residuals would be lost because no ``compensated`` in
      ``new_tx`` keeps them.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_mp
    >>> params = {'w': jnp.full((64, 128), 0.1)}  # float32
    >>> old, new = optax.adamw(1e-3), optax_mp.adamw_8bit(1e-3)
    >>> params, state = optax_mp.checkpoint.convert(
    ...   old, new, old.init(params), params, jnp.bfloat16
    ... )
    >>> updates, state = new.update(params, state, params)
    >>> print(params['w'].dtype, type(state).__name__)
    bfloat16 CompensatedState

  **Caveats:** codes are rounded again, so a conversion to a smaller format and
  back loses precision. ``convert`` works under ``jit``, where XLA may keep
  several arrays in float32 at once; for the lowest peak, call it outside.
  """
  bare = _leaves.checked(_boxes.unbox(params), 'params')
  state = _boxes.unbox(state)
  plain = _plain.leaves(_plain.spec(old_tx, bare), state)
  like = _weights.narrow_like(bare, dtype)
  spec = _plain.spec(new_tx, like)
  new_params, residuals = _weights.recut(bare, state, like, spec)
  spec = _float32.with_residuals(spec, residuals)
  plain = _plain.placed(plain, new_params)
  new_state = _with_counts(_plain.wrapped(spec, plain), state)
  new_state = _layout.lay_out(new_state, new_params)
  new_state = _boxed.box_state(new_state, params)
  return _boxes.box_like(params, new_params), new_state


def _with_counts(new: Any, old: Any) -> Any:
  """The new state with the noise counts of the old one, so no noise repeats.

  Only states of the same wrappers share counts: others start to count anew.
  """
  counts = _counts(old)
  if len(counts) != len(_counts(new)):
    return new
  left = iter(counts)

  def replace(path, x):
    return next(left) if _is_count(path) else x

  return jax.tree_util.tree_map_with_path(replace, new)


def _counts(state: Any) -> list[Any]:
  pairs = jax.tree_util.tree_leaves_with_path(state)
  return [x for path, x in pairs if _is_count(path)]


def _is_count(path: Any) -> bool:
  return bool(path) and getattr(path[-1], 'name', None) == 'noise_count'
