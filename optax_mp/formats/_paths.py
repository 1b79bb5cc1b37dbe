# SPDX-License-Identifier: Apache-2.0
"""Where a leaf stands in a tree: its path, its state field, its own noise."""

from collections.abc import Collection
import hashlib
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

Path: TypeAlias = tuple[Any, ...]

# Flax NNX keeps each array in a Variable, which adds an attribute to the path.
_VARIABLE = ('value', 'raw_value')


def path_str(path: Path) -> str:
  """A path as rules and messages write it: ``'0/mu/layer/kernel'``."""
  if path and getattr(path[-1], 'name', None) in _VARIABLE:
    path = path[:-1]
  return jax.tree_util.keystr(path, simple=True, separator='/')


def param_paths(params: Any) -> frozenset[Path]:
  """The paths of all leaves of the parameters."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return frozenset(path for path, _ in leaves)


def split_path(path: Path, params: Collection[Path]) -> tuple[Path, Path]:
  """Cuts the path of a state's leaf into the state's part and the parameter's.

  Optax's states keep trees like the parameters, so the path of such a leaf ends
  with the path of a parameter; the longest such end is cut off.
  """
  for start in range(len(path) + 1):
    if path[start:] in params:
      return path[:start], path[start:]
  return path, ()


def fields(path: Path) -> list[str]:
  """The names of the NamedTuple fields on a path, outermost first."""
  return [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)]


def leaf_key(key: chex.PRNGKey, name: str) -> chex.PRNGKey:
  """The key of one leaf: the words of ``key`` xor a hash of the leaf's name.

  By name and not by number, so that a leaf's noise does not depend on what else
  is in the tree, and leaves of different wrappers and groups differ. Costs no
  arithmetic: the hash is a constant of the program.
  """
  if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    words = leaf_key(jax.random.key_data(key), name)
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(key))
  digest = hashlib.blake2b(name.encode(), digest_size=4 * key.shape[-1])
  return key ^ np.frombuffer(digest.digest(), np.dtype('<u4')).astype(np.uint32)


def flatten_like(
  treedef: Any, tree: Any, argument: str, other: str, hint: str = ''
) -> list[Any]:
  """The subtrees of ``tree`` at the leaves of ``treedef``.

  Args:
    treedef: the structure to find in ``tree``.
    tree: the tree, of the same structure or a deeper one.
    argument: the caller's name for ``tree``.
    other: the caller's name for what has ``treedef``.
    hint: the way out.

  Returns:
    A list as long as ``treedef`` has leaves.

  Raises:
    ValueError: if ``tree`` has another structure.
  """
  try:
    return treedef.flatten_up_to(tree)
  except (ValueError, TypeError, KeyError) as error:
    # Keys come first; behind the second semicolon JAX prints whole arrays.
    reason = '; '.join(str(error).splitlines()[0].split('; ')[:2])[:160]
    hint = hint or 'They must have the same containers and keys.'
    raise ValueError(
      f'`{argument}` does not have the structure of `{other}`; got {reason}. '
      f'{hint}'
    ) from error


OTHER_PARAMS = (
  'Was the state made for other parameters? Then call `init` again.'
)
