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


def with_own_noise(state: Any, first: int) -> Any:
  """A stack of states whose keys, of ``optax.add_noise``, differ by layer.

  Args:
    state: of all layers of a stack, as ``vmap(tx.init)`` makes it.
    first: the number of the first layer among those of all stacks.

  Returns:
    The state, keys in fields called ``rng_key`` folded with those numbers.
  """

  def own(path, x):
    if not path or getattr(path[-1], 'name', None) != 'rng_key':
      return x
    # 0 is the rest's, whose key stays what it is.
    numbers = first + 1 + jnp.arange(x.shape[0])
    return jax.vmap(jax.random.fold_in)(x, numbers)

  return jax.tree_util.tree_map_with_path(own, state)
