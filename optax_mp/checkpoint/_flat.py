# SPDX-License-Identifier: Apache-2.0
"""Flat names: a state as a dictionary, whatever its containers are."""

from typing import Any

import jax

# Attributes in which a Variable of Flax NNX or a box of Linen keeps its array.
_BOXED = ('value', 'raw_value')


def names(tree: Any) -> list[str]:
  """The name of each leaf, such as ``'0/mu/layer/kernel/codes'``, in order."""
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  return list(map(name, paths))


def by_name(tree: Any, argument: str) -> dict[str, Any]:
  """Leaves by name; a ValueError if two leaves have the same name."""
  found = dict(zip(names(tree), jax.tree.leaves(tree), strict=True))
  if len(found) < len(jax.tree.leaves(tree)):
    raise ValueError(
      f'`{argument}` must have one leaf for each name; got two with the same '
      "name, since keys joined by slashes read alike, as 'a/b' and 'a', 'b' "
      'do. Rename the parameter.'
    )
  return found


def name(path: tuple[Any, ...]) -> str:
  """The name of one leaf, without the attribute that a box adds."""
  parts = [
    jax.tree_util.keystr((key,), simple=True, separator='/') for key in path
  ]
  if parts and parts[-1] in _BOXED:
    parts = parts[:-1]
  return '/'.join(parts)
