# SPDX-License-Identifier: Apache-2.0
"""Containers that libraries change: Flax NNX makes mappings of NamedTuples."""

from collections.abc import Mapping
from typing import Any

import jax


def in_containers(stored: Any, given: Any, like: Any) -> Any:
  """Gives each stored leaf the container that the state came in.

  Flax NNX keeps NamedTuples as mappings, and what Optax merges, the states
  before and after a step, must have one structure.
  """
  treedef = jax.tree.structure(like)
  pairs = zip(
    treedef.flatten_up_to(stored), treedef.flatten_up_to(given), strict=True
  )
  return treedef.unflatten(contained(x, old) for x, old in pairs)


def contained(x: Any, given: Any) -> Any:
  """One stored leaf in the container that the old one came in."""
  if not isinstance(x, tuple) or not isinstance(given, Mapping):
    return x
  parts = {k: contained(_part(x, k), given[k]) for k in given}
  return type(given)(parts)  # type: ignore[call-arg]


def as_stored(x: Any, expected: Any) -> Any:
  """Flax NNX makes mappings of tuples: back to what the format stores."""
  if not isinstance(expected, tuple) or not isinstance(x, Mapping):
    return x
  keys = getattr(expected, '_fields', range(len(expected)))
  if set(x) != set(keys):
    return x
  parts = [as_stored(x[k], _part(expected, k)) for k in keys]
  make = getattr(type(expected), '_make', tuple)
  return make(parts)


def _part(x: tuple[Any, ...], key: Any) -> Any:
  """By name, or by number where it has none."""
  return getattr(x, key) if isinstance(key, str) else x[key]
