# SPDX-License-Identifier: Apache-2.0
"""The place of each array in a state: its name, shape, dtype and format."""

from collections.abc import Iterator
import re
from typing import Any, NamedTuple

import jax

from optax_mp._core import _boxes
from optax_mp.checkpoint import _flat
from optax_mp.checkpoint import _plain
from optax_mp.formats import _names
from optax_mp.formats import _paths
from optax_mp.formats import _rule
from optax_mp.formats import is_stored

_NAMED = re.compile(r'([a-z]+)__(\w+_v\d+)')


class Slot(NamedTuple):
  """Where one array of a state belongs."""

  name: str  # the array's name, '0/mu/w/scales__BlockInt_..._v2'
  like: Any  # the array's shape and dtype
  leaf: str  # the name of the leaf that a format stored, '0/mu/w'; or `name`
  format: str | None  # the format's name; None for an array in no format
  olds: tuple[str, ...]  # the array's possible names in version 0.1.0


def target(tx: Any, params: Any, formats: dict[str, str]) -> Any:
  """The shapes of ``tx.init(params)``, in the formats that were saved.

  Args:
    tx: the transformation.
    params: the parameters.
    formats: the result of :func:`formats_in`. It decides if a rule allows
      several formats, because a recipe chooses one of them by its ``b1``.
  """
  like = jax.eval_shape(tx.init, params)
  others = _others(_plain.spec(tx, _boxes.unbox(params)))

  def choose(path, stored):
    there = formats.get(_paths.path_str(path))
    known = others.get(_names.name_in(stored) or '', ())
    format = next((f for f in known if _names.name_of(f) == there), None)
    return _names.named(format, stored) if format else stored

  return jax.tree_util.tree_map_with_path(choose, like, is_leaf=is_stored)


def _others(spec: Any) -> dict[str, tuple[Any, ...]]:
  """The name of a rule's format -> other formats that older states may have."""
  nodes = jax.tree.leaves(spec, is_leaf=_is_decided)
  choices = [c for node in nodes if _is_decided(node) for c in node.choices]
  return {_names.name_of(c.format): c.others for c in choices if c and c.others}


def _is_decided(node: Any) -> bool:
  return isinstance(node, _rule.Decided)


def slots(target: Any) -> list[Slot]:
  """The place of each array of a state, in the order of the leaves."""
  return list(_slots(target))


def _slots(target: Any) -> Iterator[Slot]:
  nodes = jax.tree_util.tree_leaves_with_path(target, is_leaf=is_stored)
  for path, node in nodes:
    if not is_stored(node):
      name = _flat.name(path)
      yield Slot(name, node, name, None, ())
      continue
    leaf, format = _paths.path_str(path), _names.name_in(node)
    for below, like in jax.tree_util.tree_leaves_with_path(node):
      name = _flat.name((*path, *below))
      olds = (leaf + name.removeprefix(leaf).replace(f'__{format}', '', 1),)
      if len(node) == 1:  # version 0.1.0 kept a lone array without a tuple
        olds += (leaf,)
      yield Slot(name, like, leaf, format, olds if format else ())


def with_names(found: dict[str, Any], slots: list[Slot]) -> dict[str, Any]:
  """The arrays of version 0.1.0, with the names that they have today."""
  renamed = dict(found)
  for slot in slots:
    old = next((old for old in slot.olds if old in renamed), None)
    if slot.name not in renamed and old is not None:
      renamed[slot.name] = renamed.pop(old)
  return renamed


def formats_in(found: dict[str, Any]) -> dict[str, str]:
  """The formats that the arrays' names tell: name of a leaf -> its format."""
  formats = {}
  for name in found:
    parts = name.split('/')
    for i, part in enumerate(parts):
      if match := _NAMED.fullmatch(part):
        formats['/'.join(parts[:i])] = match[2]
  return formats
