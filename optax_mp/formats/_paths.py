# SPDX-License-Identifier: Apache-2.0
"""Where a leaf stands in a tree: its path, its state field, its own noise."""

import collections
from collections.abc import Collection, Iterable
import hashlib
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optax_mp.formats import _base

Path: TypeAlias = tuple[Any, ...]

# Flax NNX keeps each array in a Variable, which adds an attribute to the path.
_VARIABLE = ('value', 'raw_value')


def path_str(path: Path, in_variables: bool = False) -> str:
  """A path as rules and messages write it: ``'0/mu/layer/kernel'``.

  Args:
    path: keys, as JAX gives them.
    in_variables: whether the parameters are Flax NNX Variables, see
      :func:`are_variables`; the attribute they add is then left out, so that a
      rule sees the same path whether they are or not.

  Returns:
    The keys, joined by slashes.
  """
  if in_variables and path and _name(path[-1]) in _VARIABLE:
    path = path[:-1]
  return jax.tree_util.keystr(path, simple=True, separator='/')


def are_variables(params: Collection[Path]) -> bool:
  """True where every parameter is kept in a Variable of Flax NNX."""
  return bool(params) and all(p and _name(p[-1]) in _VARIABLE for p in params)


def _name(key: Any) -> Any:
  return getattr(key, 'name', None)


def param_paths(params: Any) -> frozenset[Path]:
  """The paths of all leaves of the parameters."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return frozenset(path for path, _ in leaves)


def split_paths(
  paths: Iterable[Path], params: Collection[Path]
) -> dict[Path, tuple[Path, Path]]:
  """Cuts paths of a state's leaves into the state's part and the parameter's.

  Optax's states keep trees like the parameters, so the path of such a leaf ends
  with the path of a parameter. Where several ends do, because a parameter is
  called like a field, the state's part is the one with the most parameters
  below it.

  Args:
    paths: of all leaves of the state.
    params: of all parameters.

  Returns:
    For each path (state's part, parameter's path or, if there is none, ()).
  """
  cuts = {
    path: [i for i in range(len(path) + 1) if path[i:] in params]
    for path in paths
  }
  below = collections.Counter(
    path[:cut] for path, starts in cuts.items() for cut in starts
  )
  found = {}
  for path, starts in cuts.items():
    cut = max(starts, key=lambda i, p=path: below[p[:i]], default=len(path))
    found[path] = (path[:cut], path[cut:])
  return found


def owners(state: Any, params: Collection[Path]) -> dict[Path, Path]:
  """The path of each leaf of a state -> that of its parameter, or ().

  Args:
    state: a state; what a format stored of one array is one leaf.
    params: the paths of all parameters.
  """
  leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=_base.is_stored)
  parts = split_paths([path for path, _ in leaves], params)
  return {path: param for path, (_, param) in parts.items()}


def fields(path: Path) -> list[str]:
  """The names of the NamedTuple fields on a path, outermost first."""
  return [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)]


def leaf_key(key: chex.PRNGKey, path: Path, whose: str = '') -> chex.PRNGKey:
  """The key of one leaf: the words of ``key`` xor a hash of the leaf's path.

  By path and not by number, so that a leaf's noise does not depend on what else
  is in the tree, and leaves of different wrappers and groups differ. Costs no
  arithmetic: the hash is a constant of the program. The last word stays: it
  counts the steps, over which noise may have to be even.
  """
  if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    words = leaf_key(jax.random.key_data(key), path, whose)
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(key))
  if path and _name(path[-1]) in _VARIABLE:
    path = path[:-1]  # the same noise inside a Variable and outside
  # The whole keys: joined by slashes, two paths may read the same.
  name = (whose + jax.tree_util.keystr(path)).encode()
  digest = hashlib.blake2b(name, digest_size=4 * (key.shape[-1] - 1))
  words = np.frombuffer(digest.digest(), np.dtype('<u4')).astype(np.uint32)
  # Word by word: what is constant stays so.
  return jnp.stack([key[i] ^ word for i, word in enumerate(words)] + [key[-1]])


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
    # Keys come first, then JAX prints whole arrays.
    reason = str(error).splitlines()[0].split('Array(')[0][:160]
    hint = hint or 'They must have the same containers and keys.'
    raise ValueError(
      f'`{argument}` does not have the structure of `{other}`; got {reason}. '
      f'{hint}'
    ) from error


OTHER_PARAMS = (
  'Was the state made for other parameters? Then call `init` again.'
)
