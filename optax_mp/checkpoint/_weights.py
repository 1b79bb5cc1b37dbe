# SPDX-License-Identifier: Apache-2.0
"""Cuts weights into parameters and residuals of another width or dtype."""

from typing import Any

import jax
import optax

from optax_mp.checkpoint import _dtypes
from optax_mp.checkpoint import _float32
from optax_mp.formats import _paths
from optax_mp.formats import _tree
from optax_mp.wrappers import _residual

_NOWHERE = optax.MaskedNode()  # the residual of a leaf that is not compensated


def narrow_like(params: Any, dtype: Any) -> Any:
  """Shapes and dtypes that new parameters shall have.

  Args:
    params: the parameters, without boxes.
    dtype: see :func:`convert`.
  """
  leaves, treedef = jax.tree.flatten(params)
  dtypes = _dtypes.leaf_dtypes(params, params if dtype is None else dtype)
  return treedef.unflatten(
    jax.ShapeDtypeStruct(x.shape, d)
    for x, d in zip(leaves, dtypes, strict=True)
  )


def recut(params: Any, state: Any, like: Any, spec: Any) -> tuple[Any, Any]:
  """Parameters and residuals for another transformation, leaf by leaf.

  Args:
    params: the parameters in training, without boxes.
    state: the state with the residuals of these parameters.
    like: see :func:`narrow_like`.
    spec: the shapes of the new state.

  Returns:
    Two trees like ``params``. The residual of a leaf that nothing compensates
    is MaskedNode().
  """
  pairs, treedef = jax.tree_util.tree_flatten_with_path(params)
  cut = [
    _recut(path, param, old, new, shape.dtype)
    for (path, param), old, new, shape in zip(
      pairs,
      _residuals(len(pairs), state),
      _residuals(len(pairs), spec),
      treedef.flatten_up_to(like),
      strict=True,
    )
  ]
  return (
    treedef.unflatten(param for param, _ in cut),
    treedef.unflatten(residual for _, residual in cut),
  )


def no_errors(params: Any, spec: Any) -> Any:
  """Residuals of parameters without rounding errors: zeros, as in ``init``."""
  leaves, treedef = jax.tree.flatten(params)
  return treedef.unflatten(
    residual
    if isinstance(residual, optax.MaskedNode)
    else _residual.no_error(param, _residual.bits_of(residual))
    for param, residual in zip(
      leaves, _residuals(len(leaves), spec), strict=True
    )
  )


def _residuals(num_params: int, state: Any) -> list[Any]:
  if not _float32.compensated_states(state):
    return [_NOWHERE] * num_params
  return _float32.find_residuals(num_params, state)


def _recut(path: Any, param: Any, old: Any, new: Any, dtype: Any) -> Any:
  """One (parameter, residual); ``new`` is the new residual, in shapes."""
  if isinstance(old, optax.MaskedNode):
    old = optax.EmptyState()  # the parameter has no residual
  else:
    old = _residual.fitting(path, param, old, _residual.bits_of(old))
  if param.dtype == dtype:
    if _tree.layout(old) == _tree.layout(new):
      return param, old
    if isinstance(new, optax.MaskedNode):
      _check_nothing_lost(path, param, old)
      return param, new
    if not jax.tree.leaves(old):
      return param, _residual.no_error(param, _residual.bits_of(new))
  weight = _residual.join(param, old)
  if isinstance(new, optax.MaskedNode) and weight.dtype != dtype:
    raise ValueError(
      f'`dtype` asks for {dtype} at {_paths.path_str(path)!r}, but no '
      f'`compensated` in `new_tx` looks after it; got a {param.dtype} '
      'parameter, whose low bits would be lost. Ask for float32 there, or wrap '
      '`new_tx` in `compensated`.'
    )
  return _float32.cut(path, weight, dtype, new)


def _check_nothing_lost(path: Any, param: Any, residual: Any) -> None:
  if jax.tree.leaves(residual):
    raise ValueError(
      f'`new_tx` keeps no residual for {_paths.path_str(path)!r}; got a '
      f'{param.dtype} parameter, whose residual in `state` would be lost. Pass '
      '`dtype=jnp.float32`, or wrap `new_tx` in `compensated`.'
    )
