# SPDX-License-Identifier: Apache-2.0
"""What of a pytree has gradients, what has none, and what is no array."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Parts(NamedTuple):
  """The arrays of a pytree, as a pytree of its own."""

  floats: list[Any]  # have gradients
  others: list[Any]  # integers, booleans, typed keys: have none


def split(tree: Any) -> tuple[Parts, Callable[[Parts], Any]]:
  """Cuts a tree into parts, and returns what puts it together again.

  Args:
    tree: any pytree; leaves that are no arrays, such as a Python bool that
      switches dropout off, stay what they are, constants of the program.

  Returns:
    The parts, and a function that makes a tree of other parts of its kind.
  """
  leaves, treedef = jax.tree.flatten(tree)
  # A number where an array belongs: 0 for a float, 1 for another.
  kinds = [is_other(x) if hasattr(x, 'dtype') else None for x in leaves]
  parts = Parts(
    *(
      [x for x, kind in zip(leaves, kinds, strict=True) if kind == which]
      for which in (False, True)
    )
  )

  def merge(parts: Parts) -> Any:
    arrays = {False: iter(parts.floats), True: iter(parts.others)}
    return treedef.unflatten(
      leaf if kind is None else next(arrays[kind])
      for leaf, kind in zip(leaves, kinds, strict=True)
    )

  return parts, merge


def is_other(x: Any) -> bool:
  """True for an array without gradient."""
  return not jnp.issubdtype(x.dtype, jnp.inexact)


def at(tree: Any, i: jax.Array) -> Any:
  """Layer ``i`` of a tree of stacks."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree
  )


def put(tree: Any, i: jax.Array, layer: Any) -> Any:
  """The stacks with ``layer`` in place of layer ``i``."""
  return jax.tree.map(
    lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 0),
    tree,
    layer,
  )
