# SPDX-License-Identifier: Apache-2.0
"""A state without wrappers: the float32 leaves of the inner transformation.

Leaves are decoded one at a time, when they are read, so that a conversion needs
room for one float32 array and not for the whole state.
"""

from collections.abc import Iterator
import dataclasses
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import optax

from optax_mp.formats import _layout
from optax_mp.formats import _names
from optax_mp.formats import _paths
from optax_mp.formats import _rule
from optax_mp.formats import _tree
from optax_mp.wrappers import _common
from optax_mp.wrappers import _compensated
from optax_mp.wrappers import _compressed

_WRAPPERS = (_compensated.CompensatedState, _compressed.CompressedState)

_HINT = (
  'Both must wrap the same optimizer, with settings that give its state the '
  'same structure, and the parameters must be those of `init`. A state that '
  'was restored as dictionaries goes through `checkpoint.rebuild` first.'
)


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
  """One array of a plain state, decoded when it is read."""

  stored: Any  # the array as the state keeps it
  format: Any = None  # None if the array is in no format
  like: Any = None  # the array's shape and dtype before it was stored
  param: Any = None  # the parameter whose sharding the array takes

  def read(self) -> Any:
    """The plain array."""
    x = _tree.decode_stored(self.format, self.stored, self.like)
    return x if self.param is None else _layout.lay_out_leaf(x, self.param)

  def is_kept_in(self, format: Any, like: Any) -> bool:
    """Whether the array is in ``format`` already."""
    return bool(
      self.format
      and self.like is not None
      and _names.name_of(self.format) == _names.name_of(format)
      and (self.like.shape, self.like.dtype) == (like.shape, like.dtype)
    )


def spec(tx: optax.GradientTransformation, params: Any) -> Any:
  """The shapes of the state of ``tx``, and the formats that its rules chose."""
  with _rule.recording(True), warnings.catch_warnings():
    warnings.simplefilter('ignore', UserWarning)  # `init` has warned before
    return jax.eval_shape(tx.init, params)


def leaves(spec: Any, state: Any) -> Any:
  """The state without wrappers; a :class:`Leaf` in place of each array.

  Args:
    spec: the result of :func:`spec` for the transformation of the state.
    state: the state, of arrays.
  """
  nodes, treedef = jax.tree.flatten(spec, is_leaf=_is_wrapper)
  found = _paths.flatten_like(treedef, state, 'state', 'tx.init(params)', _HINT)
  return treedef.unflatten(map(_unwrapped, nodes, found))


def _unwrapped(node: Any, state: Any) -> Any:
  if isinstance(node, _compensated.CompensatedState):
    _common.check_state(state, _compensated.CompensatedState)
    return leaves(node.inner_state, state.inner_state)
  if not isinstance(node, _compressed.CompressedState):
    return Leaf(state)
  _common.check_state(state, _compressed.CompressedState)
  decided: Any = node.inner_state
  found = _tree.flatten_state(decided.treedef, state.inner_state)
  chosen = _rule.formats_of(decided.choices, found)
  return decided.treedef.unflatten(
    Leaf(_tree.check_stored(path, x, format, like, 'state'), format, like)
    for path, x, format, like in zip(
      _paths_of(decided.treedef), found, chosen, _likes(decided), strict=True
    )
  )


def placed(plain: Any, params: Any) -> Any:
  """The leaves of a plain state, each with the parameter that it belongs to.

  Leaves take its sharding, so their scales are sharded as after ``init``.
  """
  own = dict(jax.tree_util.tree_leaves_with_path(params))
  owners = _paths.owners(plain, own)

  def place(path, leaf):
    # Leaves that an optimizer itself keeps in a format have arrays without an
    # owner.
    return dataclasses.replace(leaf, param=own.get(owners.get(path, ())))

  return jax.tree_util.tree_map_with_path(place, plain)


def wrapped(spec: Any, plain: Any) -> Any:
  """A state of a transformation, made of the leaves of a plain state.

  Args:
    spec: the result of :func:`spec` for the transformation, with residuals.
    plain: the result of :func:`leaves`.
  """
  pairs, treedef = jax.tree_util.tree_flatten_with_path(
    spec, is_leaf=_is_wrapper
  )
  found = _paths.flatten_like(treedef, plain, 'plain_state', 'tx', _HINT)
  return treedef.unflatten(
    _wrapped(path, node, x)
    for (path, node), x in zip(pairs, found, strict=True)
  )


def _wrapped(path: Any, node: Any, plain: Any) -> Any:
  if isinstance(node, _compensated.CompensatedState):
    inner = wrapped(node.inner_state, plain)
    return node._replace(
      inner_state=inner, noise_count=jnp.zeros((), jnp.uint32)
    )
  if not isinstance(node, _compressed.CompressedState):
    return _fitting(path, plain, node)
  decided: Any = node.inner_state
  found = _paths.flatten_like(
    decided.treedef, plain, 'plain_state', 'tx', _HINT
  )
  # The noise of `init`, which stores a state once before the first step.
  now = _common.noise_key(0, jnp.uint32(0))
  stored = [
    _encoded(path, x, choice, like, now)
    for path, x, choice, like in zip(
      _paths_of(decided.treedef),
      found,
      decided.choices,
      _likes(decided),
      strict=True,
    )
  ]
  return node._replace(
    inner_state=decided.treedef.unflatten(stored),
    noise_count=jnp.ones((), jnp.uint32),
  )


def _encoded(path: Any, plain: Leaf, choice: Any, like: Any, key: Any) -> Any:
  """The leaf in its new format; the same arrays if the format does not change.

  Few formats would store it again without an error: stochastic rounding draws
  new noise, and a scale may change by a unit in its last place.
  """
  if choice is None or choice.format is None:
    return _fitting(path, plain, like)
  if plain.is_kept_in(choice.format, like):
    return jax.tree.map(jnp.asarray, plain.stored)
  x = _fitting(path, plain, like)
  own_key = _paths.leaf_key(key, path)
  return _tree.encode_stored(choice.format, x, own_key)


def _fitting(path: Any, plain: Any, like: Any) -> Any:
  """The array in the dtype of ``like``, or a ValueError for other shapes."""
  if not isinstance(plain, Leaf):
    raise ValueError(
      f'`plain_state` has a {type(plain).__name__} at '
      f'{_paths.path_str(path)!r}, but `tx` keeps {like.dtype}{like.shape} '
      f'there. {_HINT}'
    )
  x = plain.read()
  if jnp.shape(x) != like.shape:
    raise ValueError(
      f'`plain_state` has the shape {jnp.shape(x)} at '
      f'{_paths.path_str(path)!r}, but `tx` keeps {like.dtype}{like.shape} '
      f'there. {_HINT}'
    )
  x = jnp.asarray(x)
  return x if x.dtype == like.dtype else x.astype(like.dtype)


def _paths_of(treedef: Any) -> list[Any]:
  places = treedef.unflatten(range(treedef.num_leaves))
  return [path for path, _ in jax.tree_util.tree_leaves_with_path(places)]


def _likes(decided: Any) -> Iterator[Any]:
  """Shape and dtype of each leaf before a format stored it."""
  kept = decided.treedef.flatten_up_to(decided.state)
  for choice, x in zip(decided.choices, kept, strict=True):
    if choice is not None and choice.format is not None:
      x = jax.ShapeDtypeStruct(choice.shape, jnp.float32)
    yield x


def _is_wrapper(x: Any) -> bool:
  return isinstance(x, _WRAPPERS)
