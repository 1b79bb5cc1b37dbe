# SPDX-License-Identifier: Apache-2.0
"""Converts between NamedTuples and the mappings that Flax NNX makes of them."""

from collections.abc import Mapping
from typing import Any

import jax


def in_containers(stored: Any, given: Any, like: Any) -> Any:
  """Puts each stored leaf into the container that the given state has for it.

  Flax NNX keeps NamedTuples as mappings. Optax may merge the states before and
  after a step, so they must have the same structure.
  """
  treedef = jax.tree.structure(like)
  pairs = zip(
    treedef.flatten_up_to(stored), treedef.flatten_up_to(given), strict=True
  )
  return treedef.unflatten(contained(x, old) for x, old in pairs)


def contained(x: Any, given: Any) -> Any:
  """One stored leaf, in the container of the old leaf."""
  if not isinstance(x, tuple) or not isinstance(given, Mapping):
    return x
  parts = {k: contained(_part(x, k), given[k]) for k in given}
  return type(given)(parts)  # type: ignore[call-arg]


def as_stored(x: Any, expected: Any) -> Any:
  """The tuple that a format stores, from the mapping that NNX makes of it."""
  if not isinstance(expected, tuple) or not isinstance(x, Mapping):
    return x
  keys = getattr(expected, '_fields', range(len(expected)))
  if set(x) != set(keys):
    return x
  parts = [as_stored(x[k], _part(expected, k)) for k in keys]
  make = getattr(type(expected), '_make', tuple)
  return make(parts)


def _part(x: tuple[Any, ...], key: Any) -> Any:
  """One element of a tuple, by the name of its field or by index."""
  return getattr(x, key) if isinstance(key, str) else x[key]
