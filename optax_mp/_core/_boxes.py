# SPDX-License-Identifier: Apache-2.0
"""Boxes: pytree nodes that name the axes of the array inside them.

Flax Linen boxes parameters (``nn.Partitioned``, ``nn.LogicallyPartitioned``),
and Flax NNX keeps them in Variables with metadata. A box is recognised by its
methods, since the package does not import Flax.
"""

import functools
from typing import Any

import jax

LINEN = ('unbox', 'replace_boxed')  # methods of flax.core.meta.AxisMetadata
NNX = ('get_metadata', 'set_metadata')  # methods of flax.nnx.Variable


def is_box(x: Any) -> bool:
  """Whether ``x`` is a box around one array; for ``is_leaf=``."""
  kind = type(x)
  return _has_methods(kind) and len(jax.tree.leaves(x)) == 1


@functools.cache
def _has_methods(kind: type) -> bool:
  return any(
    all(hasattr(kind, name) for name in names) for names in (LINEN, NNX)
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
    tree: a tree without boxes, otherwise of the same structure.
  """
  nodes, treedef = jax.tree.flatten(boxed, is_leaf=is_box)
  values = treedef.flatten_up_to(tree)
  return treedef.unflatten(
    with_value(node, value) if is_box(node) else value
    for node, value in zip(nodes, values, strict=True)
  )


def with_value(box: Any, value: Any) -> Any:
  """The box with another value; hooks and constraints of Flax do not run."""
  return jax.tree.structure(box).unflatten([value])
