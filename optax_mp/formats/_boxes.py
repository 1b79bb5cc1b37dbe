# SPDX-License-Identifier: Apache-2.0
"""Boxes: pytree nodes that give the axes of the array inside them names.

Flax Linen boxes parameters (``nn.Partitioned``, ``nn.LogicallyPartitioned``),
Flax NNX keeps them in Variables with metadata. Optax maps over such trees, so
every array of its state gets its parameter's names, also where it has another
shape and they are wrong: a row of scales cannot be cut like a kernel. Therefore
transformations of this library see arrays alone, and each array of their state
gets a box of its own, with the names of those axes that it shares.

A box is recognised by its methods, since the package does not import Flax.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import optax

from optax_mp.formats import _axes
from optax_mp.formats import _base
from optax_mp.formats import _paths

_LINEN = ('unbox', 'replace_boxed')  # of flax.core.meta.AxisMetadata
_NNX = ('get_metadata', 'set_metadata')  # of flax.nnx.Variable
# Where Variables keep the names of axes; the second is for optimizers alone.
_SHARDINGS = ('out_sharding', 'optimizer_sharding', 'sharding_names')


def is_box(x: Any) -> bool:
  """Whether ``x`` is a box around one array; for ``is_leaf=``."""
  kind = type(x)
  return _has_methods(kind) and len(jax.tree.leaves(x)) == 1


@functools.cache
def _has_methods(kind: type) -> bool:
  return any(
    all(hasattr(kind, name) for name in names) for names in (_LINEN, _NNX)
  )


def has_boxes(*trees: Any) -> bool:
  """Whether any node of the trees is a box."""
  return any(map(is_box, jax.tree.leaves(trees, is_leaf=is_box)))


def unbox(tree: Any) -> Any:
  """The tree with the arrays alone in place of their boxes."""
  return jax.tree.map(
    lambda x: jax.tree.leaves(x)[0] if is_box(x) else x, tree, is_leaf=is_box
  )


def box_like(boxed: Any, tree: Any) -> Any:
  """``tree`` in the boxes of a tree of the same structure.

  Args:
    boxed: the tree with the boxes.
    tree: one without, otherwise of the same structure.
  """
  nodes, treedef = jax.tree.flatten(boxed, is_leaf=is_box)
  values = treedef.flatten_up_to(tree)
  return treedef.unflatten(
    _with_value(node, value) if is_box(node) else value
    for node, value in zip(nodes, values, strict=True)
  )


def box_state(state: Any, params: Any) -> Any:
  """A state of arrays alone, each in a box of its own.

  Args:
    state: the state, without boxes.
    params: the parameters, boxed or in part.

  Returns:
    The state, where each array that belongs to a boxed parameter is in a box of
    the same kind with the names of its own axes.
  """
  nodes = jax.tree.leaves(params, is_leaf=is_box)
  paths = [p for p, _ in jax.tree_util.tree_leaves_with_path(unbox(params))]
  boxes = dict(zip(paths, nodes, strict=True))
  owners = _paths.owners(state, paths)

  def own(path, stored):
    box = boxes.get(owners[path])
    if not is_box(box):
      return stored
    return jax.tree.map(functools.partial(_own_box, box), stored)

  return jax.tree_util.tree_map_with_path(own, state, is_leaf=_base.is_stored)


def transparent(
  tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  """``tx`` for trees with boxes: it sees arrays alone.

  Args:
    tx: a transformation of trees of arrays.

  Returns:
    A transformation whose updates are boxed like the gradients, and whose state
    has a box for each array of a boxed parameter.
  """

  def init_fn(params):
    if not has_boxes(params):
      return tx.init(params)
    return box_state(tx.init(unbox(params)), params)

  def update_fn(updates, state, params=None, **extra_args):
    if not has_boxes(updates, state, params):
      return tx.update(updates, state, params, **extra_args)
    new_updates, new_state = tx.update(
      unbox(updates), unbox(state), unbox(params), **extra_args
    )
    return box_like(updates, new_updates), box_like(state, new_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _with_value(box: Any, value: Any) -> Any:
  """The box with another value; hooks and constraints of Flax do not run."""
  return jax.tree.structure(box).unflatten([value])


def _own_box(box: Any, x: Any) -> Any:
  """``x`` in a box like its parameter's, with the names of its own axes."""
  shape = jax.tree.leaves(box)[0].shape
  own = _with_value(box, x)
  if x.shape == shape:
    return own

  def follow(names):
    return tuple(_axes.follow(tuple(names), shape, x.shape))

  if hasattr(type(box), _NNX[0]):
    return _rename_variable(own, follow)
  if not hasattr(box, 'names'):  # a box of the user's, which we cannot rename
    return x
  return dataclasses.replace(own, names=follow(box.names))


def _rename_variable(variable: Any, follow: Callable[[Any], Any]) -> Any:
  """The Variable, its shardings with the names that ``follow`` gives."""
  for key in _SHARDINGS:
    names = variable.get_metadata(key, None)
    if isinstance(names, NamedSharding):
      own = PartitionSpec(*follow(names.spec))
      variable.set_metadata(key, NamedSharding(names.mesh, own))
    elif isinstance(names, PartitionSpec):
      variable.set_metadata(key, PartitionSpec(*follow(names)))
    elif names:
      variable.set_metadata(key, follow(names))
  return variable
