# SPDX-License-Identifier: Apache-2.0
"""Which leaf of a pytree is kept in which format."""

from collections.abc import Callable, Mapping
import functools
import math
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp

from optax_mp.formats import _base

Path: TypeAlias = tuple[Any, ...]
Rule: TypeAlias = (
  _base.Format
  | Mapping[str, _base.Format | None]
  | Callable[[str, Any], _base.Format | None]
)


def encode_tree(
  tree: Any,
  rule: Rule,
  key: chex.PRNGKey | None = None,
  *,
  min_size: int = 0,
) -> Any:
  """Stores the floating-point leaves of a tree in the formats of a rule.

  Args:
    tree: a pytree of arrays. Leaves that are not floating-point stay as they
      are.
    rule: one of

      * a format, for every leaf;
      * a mapping from state field to format or None, for the leaves below a
        field of a NamedTuple with that name (``{'mu': ..., 'nu': ...}``);
        fields it does not name stay as they are;
      * a function ``(path, leaf) -> format or None``, with the path as in
        ``'0/mu/layer/kernel'``, the leaf's ``shape`` and ``dtype``.
    key: a PRNG key, for formats that round stochastically; each leaf gets its
      own, and each value of a leaf its own noise.
    min_size: leaves with fewer values stay as they are.

  Returns:
    The tree, with stored leaves (see :func:`is_stored`) where the rule says so.

  Raises:
    ValueError: if a format needs a key and there is none, or the rule returns
      something else than a format or None.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_mp import formats
    >>> tree = {'w': jnp.ones((2, 2)), 'step': jnp.array(3)}
    >>> stored = formats.encode_tree(tree, formats.Split(8))
    >>> stored['w'].low.dtype, stored['step'].dtype
    (dtype('uint8'), dtype('int32'))
  """
  chosen = leaf_formats(tree, rule, min_size)
  leaves, treedef = jax.tree.flatten(tree)
  keys = [None] * len(leaves) if key is None else _split(key, len(leaves))
  return treedef.unflatten(
    leaf if format is None else encode(format, leaf, leaf_key)
    for leaf, format, leaf_key in zip(leaves, chosen, keys, strict=True)
  )


def decode_tree(
  stored: Any, like: Any, rule: Rule, *, min_size: int = 0
) -> Any:
  """Gives back the tree that :func:`encode_tree` stored.

  Args:
    stored: what :func:`encode_tree` returned.
    like: a tree of arrays or ShapeDtypeStructs: structure, shapes and dtypes of
      what was stored (``jax.eval_shape(tx.init, params)``).
    rule: the rule it was stored by.
    min_size: the ``min_size`` it was stored by.

  Returns:
    A tree of arrays with the structure, shapes and dtypes of ``like``.

  Raises:
    ValueError: if ``stored`` does not have the structure of ``like``.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_mp import formats
    >>> tree, rule = {'w': jnp.array([1.001])}, formats.Split(16)
    >>> stored = formats.encode_tree(tree, rule)
    >>> print(formats.decode_tree(stored, tree, rule)['w'])
    [1.001]
  """
  chosen = leaf_formats(like, rule, min_size)
  leaves, treedef = jax.tree.flatten(like)
  stored_leaves = flatten_like(treedef, stored, 'stored', 'like')
  return treedef.unflatten(
    stored_leaf if format is None else decode(format, stored_leaf, leaf)
    for stored_leaf, format, leaf in zip(
      stored_leaves, chosen, leaves, strict=True
    )
  )


# Compiled apart, so that a model of many layers traces each format once for
# each shape and not once for each leaf.
@functools.partial(jax.jit, static_argnums=0)
def encode(format: _base.Format, x: Any, key: Any = None) -> Any:
  """``format.encode(x, key)``."""
  return format.encode(x, key)


def decode(format: _base.Format, stored: Any, like: Any) -> Any:
  """``format.decode(stored, like)``."""
  return _decode(format, stored, like.shape, jnp.dtype(like.dtype))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _decode(format: _base.Format, stored: Any, shape: Any, dtype: Any) -> Any:
  return format.decode(stored, jax.ShapeDtypeStruct(shape, dtype))


def leaf_formats(
  tree: Any, rule: Rule, min_size: int = 0
) -> list[_base.Format | None]:
  """The format of each leaf of ``tree``, in their order."""
  check_rule(rule)
  return [
    _choose(rule, path, leaf) if _qualifies(leaf, min_size) else None
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]


def check_rule(rule: Any) -> None:
  """Raises a ValueError unless ``rule`` is one of the three kinds of rule."""
  if isinstance(rule, Mapping):
    for field, format in rule.items():
      if format is not None:
        _base.check_format(format, f'rule[{field!r}]')
  elif not callable(rule) or isinstance(rule, type):
    _base.check_format(rule, 'rule')


def fields(path: Path) -> list[str]:
  """The names of the NamedTuple fields on a path, outermost first."""
  return [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)]


def path_str(path: Path) -> str:
  """A path as rules and messages write it: ``'0/mu/layer/kernel'``."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def flatten_like(treedef: Any, tree: Any, argument: str, other: str) -> list:
  """The subtrees of ``tree`` at the leaves of ``treedef``."""
  try:
    return treedef.flatten_up_to(tree)
  except (ValueError, TypeError, KeyError) as error:
    reason = str(error).splitlines()[0][:200]  # jax prints whole arrays
    raise ValueError(
      f'`{argument}` does not have the structure of `{other}`; got {reason}. '
      'Was the state made for other parameters? Then call `init` again.'
    ) from error


def _choose(rule: Rule, path: Path, leaf: Any) -> _base.Format | None:
  """What the rule says of one leaf."""
  if isinstance(rule, Mapping):
    # The outermost field that is named: below it are the parameters' own keys.
    named = [field for field in fields(path) if field in rule]
    return rule[named[0]] if named else None
  if isinstance(rule, _base.Format):
    return rule
  format = rule(path_str(path), leaf)
  if format is not None:
    _base.check_format(format, f'rule({path_str(path)!r}, ...)')
  return format


def _qualifies(leaf: Any, min_size: int) -> bool:
  """Floating-point and large enough; integers and small leaves stay alone."""
  floating = jnp.issubdtype(leaf.dtype, jnp.floating)
  return floating and math.prod(leaf.shape) >= min_size


def _split(key: chex.PRNGKey, number: int) -> list[chex.PRNGKey]:
  return list(jax.random.split(key, number))
