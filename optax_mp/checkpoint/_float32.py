# SPDX-License-Identifier: Apache-2.0
"""Takes float32 parameters out of a training run, and starts runs from them."""

from typing import Any
import warnings

import chex
import jax
import jax.numpy as jnp
import optax

from optax_mp._core import _boxes
from optax_mp.checkpoint import _dtypes
from optax_mp.formats import _boxed
from optax_mp.formats import _leaves
from optax_mp.formats import _paths
from optax_mp.wrappers import _compensated
from optax_mp.wrappers import _residual


def to_float32(params: optax.Params, state: optax.OptState) -> optax.Params:
  """Joins 16-bit parameters and their residuals to float32 parameters.

  Take it to evaluate, average or publish the float32 weights of a run.

  Args:
    params: the parameters in training.
    state: the optimizer state; ``compensated`` may be anywhere inside it, also
      under ``optax.masked`` and ``optax.partition``. For ``nnx.Optimizer``:
      ``to_float32(nnx.state(model, nnx.Param), optimizer.opt_state)``.

  Returns:
    A tree like ``params``, with 16-bit leaves in float32. With 16 residual bits
    they are the master weights, bit for bit. With 8 bits they are within 2^-15
    of the master weights, relative to their size. Without residual bits they
    are the parameters themselves.

  Raises:
    ValueError: if the residuals do not fit ``params``, or if a 16-bit parameter
      is in no ``compensated``.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_mp
    >>> params = jnp.ones((), jnp.bfloat16)
    >>> tx = optax_mp.compensated(optax.sgd(1e-3))
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> print(params, optax_mp.checkpoint.to_float32(params, state))
    1 0.999
  """
  if compensated_states(params):
    raise ValueError(
      '`params` must be the parameters; got an optimizer state. Call '
      '`to_float32(params, state)`.'
    )
  params = _leaves.checked(params, 'params')
  weights = masters(_boxes.unbox(params), _boxes.unbox(state))
  return _boxes.box_like(params, weights)


def masters(params: Any, state: Any) -> Any:
  """:func:`to_float32` for trees without boxes."""
  pairs, treedef = jax.tree_util.tree_flatten_with_path(params)
  residuals = find_residuals(len(pairs), state)
  weights = []
  for (path, leaf), residual in zip(pairs, residuals, strict=True):
    if isinstance(residual, optax.MaskedNode):
      _check_needs_none(path, leaf)
      residual = optax.EmptyState()
    bits = _residual.bits_of(residual)
    residual = _residual.fitting(path, leaf, residual, bits)
    weights.append(_residual.join(leaf, residual))
  return treedef.unflatten(weights)


def from_float32(
  tx: optax.GradientTransformation,
  params32: optax.Params,
  dtype: Any = jnp.bfloat16,
) -> tuple[optax.Params, optax.OptState]:
  """Starts training from a float32 checkpoint without losing its low bits.

  ``tx.init(params)`` sees 16-bit parameters and can only start from residuals
  of zero. This function cuts each float32 weight w as training does, ``params,
  residual = split(w)``, and initializes the inner state from w itself.

  Args:
    tx: a transformation with ``compensated`` in it.
    params32: float32 parameters.
    dtype: the dtype of the 16-bit parameters, or a tree like ``params32`` of
      dtypes, arrays or ShapeDtypeStructs. Leaves with float32 stay float32.

  Returns:
    ``(params, state)``, to train with ``tx``. ``to_float32(params, state)``
    gives ``params32`` back, bit for bit with 16 residual bits.

  Raises:
    ValueError: if a leaf that shall have 16 bits is in no ``compensated``, if
      ``tx`` chooses its parts by dtype, or if ``dtype`` has anything but
      bfloat16, float16 and float32.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_mp
    >>> weights = {'w': jnp.array([0.1, 0.2])}
    >>> tx = optax_mp.compensated(optax.sgd(1e-3))
    >>> params, state = optax_mp.checkpoint.from_float32(tx, weights)
    >>> print(params['w'], optax_mp.checkpoint.to_float32(params, state)['w'])
    [0.100098 0.200195] [0.1 0.2]
  """
  params32 = _leaves.checked(params32, 'params32')
  weights = _boxes.unbox(params32)
  dtypes = _dtypes.leaf_dtypes(weights, _boxes.unbox(dtype))
  params, state = jax.jit(lambda w: _start(tx, w, dtypes))(weights)
  state = _boxed.box_state(state, params32)
  return _boxes.box_like(params32, params), state


def _start(tx: Any, params32: Any, dtypes: list[Any]) -> tuple[Any, Any]:
  """Parameters and state, from float32 weights and their new dtypes."""
  leaves, treedef = jax.tree.flatten(params32)
  narrow = [x.astype(dtype) for x, dtype in zip(leaves, dtypes, strict=True)]
  state = tx.init(treedef.unflatten(narrow))
  with warnings.catch_warnings():  # float32 parameters are intended here
    warnings.simplefilter('ignore', UserWarning)
    state32 = tx.init(params32)

  residuals = find_residuals(len(leaves), state)
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params32)]
  pairs = [
    cut(path, x, dtype, residual)
    for path, x, dtype, residual in zip(
      paths, leaves, dtypes, residuals, strict=True
    )
  ]
  new = treedef.unflatten(residual for _, residual in pairs)
  state = with_residuals(state, new)

  def merge(node, node32):
    if not _is_compensated(node):
      return node
    return node._replace(inner_state=node32.inner_state)

  treedef16 = jax.tree.structure(state, is_leaf=_is_compensated)
  hint = 'Choose its parts by name or shape, not by dtype.'
  nodes32 = _paths.flatten_like(
    treedef16, state32, 'tx.init(params32)', 'tx.init(params)', hint
  )
  nodes = jax.tree.leaves(state, is_leaf=_is_compensated)
  state = treedef16.unflatten(map(merge, nodes, nodes32))
  return treedef.unflatten(param for param, _ in pairs), state


def with_residuals(state: Any, residuals: Any) -> Any:
  """The state with new residuals, for all parameters that have a residual."""

  def replace(node):
    if not _is_compensated(node):
      return node
    new = jax.tree.map(
      lambda old, new: old if _is_empty(old) else new,
      node.residual,
      residuals,
      is_leaf=_is_residual,
    )
    return node._replace(residual=new)

  return jax.tree.map(replace, state, is_leaf=_is_compensated)


def cut(path: Any, x: chex.Array, dtype: Any, residual: Any):
  """One float32 leaf -> (parameter, residual), rounded to nearest."""
  if x.dtype == dtype:
    return x, residual
  if isinstance(residual, optax.MaskedNode):
    raise ValueError(
      f'`params32` has a leaf {_paths.path_str(path)!r} that no `compensated` '
      f'in `tx` looks after; got {jnp.dtype(dtype)} for it, which would lose '
      'its low bits. Ask for float32 there through `dtype`, or compensate it.'
    )
  format = _residual.format_of(dtype, _residual.bits_of(residual), 'nearest')
  assert format is not None  # `_float_dtype` has checked the dtype
  return _residual.cut(format, format.encode(x.astype(jnp.float32)))


def _check_needs_none(path: Any, leaf: Any) -> None:
  """Raises a ValueError for a 16-bit parameter that nothing compensates."""
  if _residual.format_of(leaf.dtype, 0) is not None:
    raise ValueError(
      f'`state` must hold the residual of {_paths.path_str(path)!r}; got none '
      f'for this {leaf.dtype} parameter. Without `compensated` it is all there '
      'is: cast it.'
    )


def find_residuals(num_params: int, state: Any) -> list[Any]:
  """The residual of each parameter; MaskedNode() if it is not compensated.

  They are matched by order: `nnx.Optimizer` keeps them in other containers.
  """
  found = [
    jax.tree.leaves(node.residual, is_leaf=_is_residual)
    for node in compensated_states(state)
  ]
  if any(len(column) != num_params for column in found):
    raise ValueError(
      f'`state` does not have the structure of `params`; got {len(found[0])} '
      f'residuals for {num_params} parameters. {_paths.OTHER_PARAMS}'
    )
  nowhere = optax.MaskedNode()
  return [
    next((r for r in row if not isinstance(r, optax.MaskedNode)), nowhere)
    for row in zip(*found, [nowhere] * num_params, strict=True)
  ]


def compensated_states(tree: Any) -> list[Any]:
  nodes = jax.tree.leaves(tree, is_leaf=_is_compensated)
  return [node for node in nodes if _is_compensated(node)]


def _is_compensated(node: Any) -> bool:
  return isinstance(node, _compensated.CompensatedState)


def _is_residual(node: Any) -> bool:
  return _is_empty(node) or _residual.is_residual(node)


def _is_empty(node: Any) -> bool:
  return isinstance(node, (optax.EmptyState, optax.MaskedNode))
