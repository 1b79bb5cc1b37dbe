# SPDX-License-Identifier: Apache-2.0
"""A state out of what a checkpoint library gives back without a target."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_mp._core import _boxes
from optax_mp.checkpoint import _flat

# 'w/scales__BlockInt_..._v2' -> ('w/', 'scales', 'BlockInt_..._v2')
_NAMED = re.compile(r'(.*/|)([a-z]+)__(\w+_v\d+)')
# Fields that stand for a whole array: version 0.1.0 kept it alone.
_ALONE = ('low', 'codes')


def rebuild(
  tx: optax.GradientTransformation,
  params: optax.Params,
  tree: Any,
  *,
  unnamed: bool = False,
) -> Any:
  """The state of ``tx`` with the arrays of a tree of plain containers.

  Take it where a library gave back dictionaries and lists in place of a state:
  Orbax without a target, ``flax.serialization.msgpack_restore``, arrays by
  name. Nothing is converted: :func:`convert` does that afterwards.

  Args:
    tx: the transformation that made the state.
    params: the parameters, or their shapes and dtypes.
    tree: the arrays, in mappings whose keys are names of fields and indices, in
      lists, or in the state's own containers.
    unnamed: whether ``tree`` may be a state of version 0.1.0, which did not
      name formats. You then vouch that this very ``tx`` made it.

  Returns:
    A state with the containers of ``tx.init(params)``.

  Raises:
    ValueError: if ``tree`` has other leaves, shapes or dtypes, or was stored in
      another format; the message names the leaf and both formats.

  Examples:
    >>> import flax, jax.numpy as jnp, optax_mp
    >>> params = {'w': jnp.ones((64, 128), jnp.bfloat16)}
    >>> tx = optax_mp.adamw_8bit(1e-3)
    >>> data = flax.serialization.to_bytes(tx.init(params))
    >>> tree = flax.serialization.msgpack_restore(data)  # dictionaries
    >>> state = optax_mp.checkpoint.rebuild(tx, params, tree)
    >>> print(type(state).__name__)
    CompensatedState
  """
  target = jax.eval_shape(tx.init, params)
  found = _flat.by_name(_boxes.unbox(tree), 'tree')
  if unnamed:
    found = _with_names(found, _flat.names(target))
  wanted = _flat.by_name(target, 'params')
  _check_names(wanted, found)
  leaves = [_fitting(name, found[name], like) for name, like in wanted.items()]
  return jax.tree.structure(target).unflatten(leaves)


def _check_names(wanted: dict[str, Any], found: dict[str, Any]) -> None:
  missing = [name for name in wanted if name not in found]
  if missing:
    raise ValueError(_what_is_there(missing[0], found))
  extra = [name for name in found if name not in wanted]
  if extra:
    raise ValueError(
      f'`tree` has {extra[0]!r}, of which a state of `tx` has nothing; got '
      f'{len(found)} arrays for {len(wanted)}. Rebuild it with the '
      'transformation that made it, then use `checkpoint.convert`.'
    )


def _what_is_there(name: str, found: dict[str, Any]) -> str:
  """The message for an array that is missing: what is there in its place."""
  way_out = (
    'Rebuild it with the transformation that made it, then use '
    '`checkpoint.convert(old_tx, new_tx, state, params)`.'
  )
  match = _NAMED.fullmatch(name)
  if match is None:
    return f'`tree` has no array {name!r}; got {sorted(found)[:4]}. {way_out}'
  parent, field, format = match.groups()
  leaf = parent.rstrip('/')
  for other in found:
    theirs = _NAMED.fullmatch(other)
    if theirs and theirs[1] == parent:
      return (
        f'`tree` has {theirs[3]} at {leaf!r}, but `tx` stores {format} there. '
        f'{way_out}'
      )
  if parent + field in found or leaf in found and field in _ALONE:
    return (
      f'`tree` has an array without the name of a format at {leaf!r}, where '
      f'`tx` stores {format}: version 0.1.0 saved it, or `tx` was another one. '
      'If the same `tx` made it, pass `unnamed=True`.'
    )
  return f'`tree` has no {format} at {leaf!r}. {way_out}'


def _with_names(found: dict[str, Any], wanted: list[str]) -> dict[str, Any]:
  """Arrays of version 0.1.0 under the names that they have today."""
  renamed = dict(found)
  for name in wanted:
    match = _NAMED.fullmatch(name)
    if match is None or name in renamed:
      continue
    parent, field, _ = match.groups()
    olds = [parent + field]
    if field in _ALONE:
      olds.append(parent.rstrip('/'))
    old = next((old for old in olds if old in renamed), None)
    if old is not None:
      renamed[name] = renamed.pop(old)
  return renamed


def _fitting(name: str, x: Any, like: Any) -> Any:
  shape, dtype = jnp.shape(x), getattr(x, 'dtype', None)
  if shape != like.shape or dtype != like.dtype:
    raise ValueError(
      f'`tree` has {dtype}{shape} at {name!r}, but `tx` keeps '
      f'{like.dtype}{like.shape} there. Restore with the dtypes that were '
      'saved, and with the parameters that the state was made for.'
    )
  return jnp.asarray(x)
