# SPDX-License-Identifier: Apache-2.0
"""Stores the leaves of a pytree, each in its format, and decodes them again."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_mp._core import _derivatives
from optax_mp.formats import _base
from optax_mp.formats import _containers
from optax_mp.formats import _fitted
from optax_mp.formats import _leaves
from optax_mp.formats import _names
from optax_mp.formats import _paths
from optax_mp.formats import _rule


def encode_tree(
  tree: Any,
  rule: _rule.Rule,
  key: chex.PRNGKey | None = None,
  *,
  min_size: int = 0,
) -> Any:
  """Stores the floating-point leaves of a tree in the formats of a rule.

  Take it for a tree of your own. :func:`optax_mp.compressed` does the same for
  the state of an optimizer.

  Args:
    tree: a pytree of arrays. Leaves that are not floating-point stay as they
      are.
    rule: one of

      * a format, for every leaf;
      * a mapping from state field to format, function or None, for the leaves
        below a field of a NamedTuple with that name (``{'mu': ..., 'nu':
        ...}``); all other fields stay as they are;
      * a function ``(path, leaf) -> format or None``; the path is a string such
        as ``'0/mu/layer/kernel'``, the leaf has a ``shape`` and a ``dtype``.
    key: a PRNG key, for formats that round stochastically. Each leaf gets its
      own key, and each value of a leaf its own noise.
    min_size: leaves with fewer values stay as they are.

  Returns:
    The tree. Each leaf with a format is a stored leaf (see :func:`is_stored`).

  Raises:
    ValueError: if a format needs a key and ``key`` is None, or if the rule
      returns anything but a format or None.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_mp import formats
    >>> tree = {'w': jnp.ones((2, 2)), 'step': jnp.array(3)}
    >>> stored = formats.encode_tree(tree, formats.Split(8))
    >>> stored['w'].low.dtype, stored['step'].dtype
    (dtype('uint8'), dtype('int32'))
  """
  tree = _leaves.checked(tree, 'tree')
  chosen = _rule.leaf_formats(tree, rule, min_size)
  _rule.check_fields(tree, rule)
  return encode_leaves(tree, chosen, key)


def decode_tree(
  stored: Any, like: Any, rule: _rule.Rule, *, min_size: int = 0
) -> Any:
  """Gives back the tree that :func:`encode_tree` stored.

  Args:
    stored: the result of :func:`encode_tree`.
    like: a tree of arrays or ShapeDtypeStructs with the structure, shapes and
      dtypes of the original tree (``jax.eval_shape(tx.init, params)``).
    rule: the rule that the tree was stored with.
    min_size: the ``min_size`` that the tree was stored with.

  Returns:
    A tree of arrays with the structure, shapes and dtypes of ``like``.

  Raises:
    ValueError: if the rule would store a tree like ``like`` in another form.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_mp import formats
    >>> tree, rule = {'w': jnp.array([1.001])}, formats.Split(16)
    >>> stored = formats.encode_tree(tree, rule)
    >>> print(formats.decode_tree(stored, tree, rule)['w'])
    [1.001]
  """
  return decode_leaves(stored, like, _rule.leaf_formats(like, rule, min_size))


def encode_leaves(
  tree: Any,
  chosen: list[_base.Format | None],
  key: chex.PRNGKey | None = None,
  scales: list[Any] | None = None,
) -> Any:
  """:func:`encode_tree` for chosen formats and, if given, fitted scales."""
  leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
  scales = [None] * len(leaves) if scales is None else scales
  stored = []
  for (path, leaf), format, scale in zip(leaves, chosen, scales, strict=True):
    if format is None:
      stored.append(leaf)
      continue
    own_key = None if key is None else _paths.leaf_key(key, path)
    stored.append(encode_stored(format, leaf, own_key, scale))
  return treedef.unflatten(stored)


def fit_leaves(tree: Any, chosen: list[_base.Format | None]) -> list[Any]:
  """The scales that each leaf's format fits; None if it has nothing to fit."""
  return [
    None if format is None else fit(format, leaf)
    for leaf, format in zip(jax.tree.leaves(tree), chosen, strict=True)
  ]


def decode_leaves(
  stored: Any,
  like: Any,
  chosen: list[_base.Format | None],
  argument: str = 'stored',
) -> Any:
  """:func:`decode_tree` for formats that are chosen already."""
  leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
  found = flatten_state(treedef, stored, argument)
  decoded = []
  for (path, leaf), format, x in zip(leaves, chosen, found, strict=True):
    x = check_stored(path, x, format, leaf, argument)
    decoded.append(decode_stored(format, x, leaf))
  return treedef.unflatten(decoded)


def flatten_state(
  treedef: Any, stored: Any, argument: str = 'state', hint: str = ''
) -> list[Any]:
  """The stored leaves, in order; a ValueError for another structure."""
  hint = hint or _paths.OTHER_PARAMS
  return _paths.flatten_like(treedef, stored, argument, 'like', hint)


def encode_stored(
  format: _base.Format, x: Any, key: Any = None, scales: Any = None
) -> Any:
  """One leaf as a state keeps it: with the name of its format."""
  return _names.named(format, encode(format, x, key, scales))


def decode_stored(format: _base.Format | None, stored: Any, like: Any) -> Any:
  """The inverse of :func:`encode_stored`; the leaf itself without a format."""
  if format is None:
    return stored
  return decode(format, _names.nameless(stored), like)


# Compiled by itself, so that a model of many layers traces each format once per
# shape and not once per leaf.
@functools.partial(jax.jit, static_argnums=0)
def encode(
  format: _base.Format, x: Any, key: Any = None, scales: Any = None
) -> Any:
  """``format.encode(x, key, scales)``."""
  return _fitted.encode(format, _derivatives.refused(x), key, scales)


@functools.partial(jax.jit, static_argnums=0)
def fit(format: _base.Format, x: Any) -> Any:
  """``format.fit(x)``."""
  return _fitted.fit(format, x)


def decode(format: _base.Format, stored: Any, like: Any) -> Any:
  """``format.decode(stored, like)``."""
  return _decode(format, stored, like.shape, jnp.dtype(like.dtype))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _decode(format: _base.Format, stored: Any, shape: Any, dtype: Any) -> Any:
  stored = _derivatives.refused(stored)
  return format.decode(stored, jax.ShapeDtypeStruct(shape, dtype))


def check_stored(
  path: _paths.Path,
  stored: Any,
  format: _base.Format | None,
  leaf: Any,
  argument: str,
) -> Any:
  """The stored leaf, or a ValueError if it was stored by another rule."""
  expected = leaf
  if format is not None:
    expected = stored_like(format, leaf.shape, jnp.dtype(leaf.dtype))
  found = _containers.as_stored(stored, expected)
  if layout(found) != layout(expected):
    raise ValueError(
      f'`{argument}` has {text(stored)} at {_paths.path_str(path)!r}, but '
      f'{format or "no format"} stores {text(expected)} there: rule, a '
      'setting, `min_size` or shapes (of the gradients too) changed since '
      '`init`. Use the old ones, convert the state with '
      '`checkpoint.convert(old_tx, new_tx, state, params)`, or call `init` '
      f'again.{_names.hint(stored) if format else ""}'
    )
  return found


def stored_like(format: _base.Format, shape: Any, dtype: Any) -> Any:
  """A stored leaf as a state keeps it, with its name, in shapes and dtypes."""
  return _names.named(format, _base.stored_like(format, shape, dtype))


def layout(tree: Any) -> Any:
  leaves, treedef = jax.tree.flatten(tree)
  return treedef, [(x.shape, x.dtype) for x in leaves]


def text(stored: Any) -> str:
  """A stored leaf in words: ``Split_8_v2 of bfloat16(3,) + uint8(3,)``."""
  arrays = ' + '.join(f'{x.dtype}{x.shape}' for x in jax.tree.leaves(stored))
  name = _names.describe(stored)
  return f'{name} of {arrays}' if name else arrays
