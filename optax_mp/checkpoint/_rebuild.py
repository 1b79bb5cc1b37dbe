# SPDX-License-Identifier: Apache-2.0
"""Rebuilds a state that a checkpoint library restored without its types."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_mp._core import _boxes
from optax_mp.checkpoint import _flat
from optax_mp.checkpoint import _slots

_WAY_OUT = (
  'Rebuild it with the transformation that made it, then use '
  '`checkpoint.convert(old_tx, new_tx, state, params)`.'
)


def rebuild(
  tx: optax.GradientTransformation,
  params: optax.Params,
  tree: Any,
  *,
  unnamed: bool = False,
) -> Any:
  """Makes a state of ``tx`` from restored dictionaries and lists.

  Take it if a library returned plain containers in place of a state: Orbax
  without a target, ``flax.serialization.msgpack_restore``, or arrays by name.
  It converts nothing: :func:`convert` does that afterwards.

  Args:
    tx: the transformation that made the state.
    params: the parameters, or their shapes and dtypes.
    tree: the arrays, in mappings whose keys are names of fields and indices, in
      lists, or in the state's own containers.
    unnamed: whether ``tree`` may be a state of version 0.1.0, which did not
      name formats. With True you vouch that this very ``tx`` made it.

  Returns:
    A state with the containers of ``tx.init(params)``.

  Raises:
    ValueError: if ``tree`` has other leaves, shapes or dtypes, or is in another
      format; the message then names the leaf and both formats.

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
  found = _flat.by_name(_boxes.unbox(tree), 'tree')
  target = _slots.target(tx, params, _slots.formats_in(found))
  slots = _slots.slots(_boxes.unbox(target))
  if unnamed:
    found = _slots.with_names(found, slots)
  _check_names(slots, found)
  leaves = [_fitting(slot, found[slot.name]) for slot in slots]
  return jax.tree.structure(target).unflatten(leaves)


def _check_names(slots: list[_slots.Slot], found: dict[str, Any]) -> None:
  for slot in slots:
    if slot.name not in found:
      raise ValueError(f'{_instead_of(slot, found)} {_WAY_OUT}')
  extra = set(found) - {slot.name for slot in slots}
  if extra:
    raise ValueError(
      f'`tree` has an array {min(extra)!r}, but a state of `tx` has none of '
      f'this name; got {len(found)} arrays, where it has {len(slots)}. '
      f'{_WAY_OUT}'
    )


def _instead_of(slot: _slots.Slot, found: dict[str, Any]) -> str:
  """The message for a missing array: it says what ``tree`` has in its place."""
  place, ours = repr(slot.leaf), slot.format or _text(slot.like)
  if theirs := _slots.formats_in(found).get(slot.leaf):
    return f'`tree` has {theirs} at {place}, but `tx` stores {ours} there.'
  if old := next((old for old in slot.olds if old in found), None):
    return (
      f'`tree` has {_text(found[old])} without the name of a format at '
      f'{place}, where `tx` stores {ours}. If version 0.1.0 saved it and the '
      'same `tx` made it, pass `unnamed=True`.'
    )
  if slot.leaf in found:
    there = _text(found[slot.leaf])
    return f'`tree` has {there} at {place}, but `tx` stores {ours} there.'
  return (
    f'`tree` has no {ours} at {place}; got {len(found)} arrays, such as '
    f'{sorted(found)[:3]}.'
  )


def _fitting(slot: _slots.Slot, x: Any) -> Any:
  like = slot.like
  if jnp.shape(x) != like.shape or getattr(x, 'dtype', None) != like.dtype:
    raise ValueError(
      f'`tree` has {_text(x)} at {slot.name!r}, but `tx` keeps {_text(like)} '
      'there. Restore with the dtypes that were saved, and with the parameters '
      'that the state was made for.'
    )
  return jnp.asarray(x)


def _text(x: Any) -> str:
  dtype = getattr(x, 'dtype', None) or type(x).__name__
  return f'{dtype}{jnp.shape(x)}'
