# SPDX-License-Identifier: Apache-2.0
"""Leaves that are no arrays of floats: taken as Optax takes them, or refused.

A parameter may be a Python number, an integer or bool array or a typed key,
which other parts of a chain leave alone. Functions, strings and whatever else
an unfiltered module holds are refused by name.
"""

import numbers
from typing import Any

import jax
import jax.numpy as jnp

from optax_mp.formats import _paths


def checked(tree: Any, argument: str) -> Any:
  """The tree, Python numbers as arrays; a ValueError names any other leaf.

  Args:
    tree: parameters or gradients.
    argument: the caller's name for them.
  """

  def check(path, x):
    if hasattr(x, 'dtype') and hasattr(x, 'shape'):
      return x
    if isinstance(x, numbers.Number):
      return jnp.asarray(x)
    raise ValueError(
      f'`{argument}` must be a tree of arrays; got a {type(x).__name__} at '
      f'{_paths.path_str(path)!r}. Take the arrays alone, as '
      '`equinox.filter(model, equinox.is_inexact_array)` does.'
    )

  return jax.tree_util.tree_map_with_path(check, tree)


def cast_like(state: Any, like: Any) -> Any:
  """A new state with the dtypes that it had in ``init``.

  Optax turns some states of integer and bool parameters, whose gradients mean
  nothing, into floats in the first step; ours keep their dtypes.

  Args:
    state: what an inner transformation returned.
    like: what its ``init`` returned, or the shapes and dtypes of that.
  """
  leaves, treedef = jax.tree.flatten(like)
  cast = [
    x if x.dtype == old.dtype or not _is_number(old) else x.astype(old.dtype)
    for x, old in zip(treedef.flatten_up_to(state), leaves, strict=True)
  ]
  return treedef.unflatten(cast)


def is_float(x: Any) -> bool:
  """Whether an array has a floating-point dtype; a typed key has none."""
  return jnp.issubdtype(x.dtype, jnp.floating)


def _is_number(x: Any) -> bool:
  return not jnp.issubdtype(x.dtype, jax.dtypes.extended)
