# SPDX-License-Identifier: Apache-2.0
"""A state without wrappers: the float32 leaves of the inner transformation.

Leaves are decoded one at a time, when they are asked for, so that a conversion
needs room for one float32 array and not for the whole state.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias
import warnings

import jax
import jax.numpy as jnp
import optax

from optax_mp.formats import _paths
from optax_mp.formats import _rule
from optax_mp.formats import _tree
from optax_mp.wrappers import _common
from optax_mp.wrappers import _compensated
from optax_mp.wrappers import _compressed

_WRAPPERS = (_compensated.CompensatedState, _compressed.CompressedState)
Leaf: TypeAlias = Callable[[], Any]  # gives a plain array when it is called

_HINT = (
  'Both must wrap the same optimizer, with settings that give its state the '
  'same structure, and the parameters must be those of `init`.'
)


def spec(tx: optax.GradientTransformation, params: Any) -> Any:
  """The state of ``tx``, in shapes, with the formats that its rules chose."""
  with _rule.recording(True), warnings.catch_warnings():
    warnings.simplefilter('ignore', UserWarning)  # `init` has warned before
    return jax.eval_shape(tx.init, params)


def leaves(spec: Any, state: Any) -> Any:
  """The state without wrappers; a :data:`Leaf` in place of each array.

  Args:
    spec: what :func:`spec` gives for the transformation of the state.
    state: arrays.
  """
  nodes, treedef = jax.tree.flatten(spec, is_leaf=_is_wrapper)
  found = _paths.flatten_like(treedef, state, 'state', 'tx.init(params)', _HINT)
  return treedef.unflatten(map(_unwrapped, nodes, found))


def _unwrapped(node: Any, state: Any) -> Any:
  if isinstance(node, _compensated.CompensatedState):
    _common.check_state(state, _compensated.CompensatedState)
    return leaves(node.inner_state, state.inner_state)
  if not isinstance(node, _compressed.CompressedState):
    return lambda: state
  _common.check_state(state, _compressed.CompressedState)
  decided = node.inner_state
  found = _tree.flatten_state(decided.treedef, state.inner_state)
  chosen = _rule.formats_of(decided.choices, found)
  kept = decided.treedef.flatten_up_to(decided.state)
  return decided.treedef.unflatten(
    _decoded(path, x, format, like)
    for path, x, format, like in zip(
      _paths_of(decided.treedef),
      found,
      chosen,
      _likes(decided, kept),
      strict=True,
    )
  )


def _decoded(path: Any, stored: Any, format: Any, like: Any) -> Leaf:
  """Checked now, decoded when it is called."""
  stored = _tree.check_stored(path, stored, format, like, 'state')
  return lambda: _tree.decode_stored(format, stored, like)


def wrapped(spec: Any, plain: Any, params: Any) -> Any:
  """A state of the transformation with the leaves of a plain one.

  Args:
    spec: what :func:`spec` gives for the transformation.
    plain: what :func:`leaves` gives.
    params: without boxes; residuals are zeros, like those of ``init``.
  """
  nodes, treedef = jax.tree.flatten(spec, is_leaf=_is_wrapper)
  found = _paths.flatten_like(treedef, plain, 'plain_state', 'tx', _HINT)
  return treedef.unflatten(
    _wrapped(node, x, params) for node, x in zip(nodes, found, strict=True)
  )


def _wrapped(node: Any, plain: Any, params: Any) -> Any:
  if isinstance(node, _compensated.CompensatedState):
    inner = wrapped(node.inner_state, plain, params)
    residual = jax.tree.map(jnp.zeros_like, node.residual)
    return node._replace(
      inner_state=inner,
      residual=residual,
      noise_count=jnp.zeros((), jnp.uint32),
    )
  if not isinstance(node, _compressed.CompressedState):
    return _fitting((), plain(), node)
  decided = node.inner_state
  found = _paths.flatten_like(
    decided.treedef, plain, 'plain_state', 'tx', _HINT
  )
  kept = decided.treedef.flatten_up_to(decided.state)
  # The noise of `init`: a state is stored once before the first step.
  now = _common.noise_key(0, jnp.uint32(0))
  stored = [
    _encoded(path, x, choice, like, now)
    for path, x, choice, like in zip(
      _paths_of(decided.treedef),
      found,
      decided.choices,
      _likes(decided, kept),
      strict=True,
    )
  ]
  return node._replace(
    inner_state=decided.treedef.unflatten(stored),
    noise_count=jnp.ones((), jnp.uint32),
  )


def _encoded(path: Any, plain: Leaf, choice: Any, like: Any, key: Any) -> Any:
  x = _fitting(path, plain(), like)
  if choice is None or choice.format is None:
    return x
  own_key = _paths.leaf_key(key, path)
  return _tree.encode_stored(choice.format, x, own_key)


def _fitting(path: Any, x: Any, like: Any) -> Any:
  """The array in the dtype of ``like``, or a ValueError for other shapes."""
  if x.shape != like.shape:
    raise ValueError(
      f'`plain_state` has the shape {x.shape} at {_paths.path_str(path)!r}, '
      f'but `tx` keeps {like.dtype}{like.shape} there. {_HINT}'
    )
  return x if x.dtype == like.dtype else x.astype(like.dtype)


def _paths_of(treedef: Any) -> list[Any]:
  places = treedef.unflatten(range(treedef.num_leaves))
  return [path for path, _ in jax.tree_util.tree_leaves_with_path(places)]


def _likes(decided: Any, kept: list[Any]) -> Iterator[Any]:
  """Shape and dtype of each leaf before a format stored it."""
  for choice, x in zip(decided.choices, kept, strict=True):
    stored = choice is not None and choice.format is not None
    yield jax.ShapeDtypeStruct(choice.shape, jnp.float32) if stored else x


def _is_wrapper(x: Any) -> bool:
  return isinstance(x, _WRAPPERS)
