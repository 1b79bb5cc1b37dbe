# SPDX-License-Identifier: Apache-2.0
"""Second moments get formats without signs.

An optimizer divides by the root of a second moment. In a format with signs,
small values beside large ones would become zeros, and a huge value would be
stored as the largest of the others: the root would be far too small, and the
weight would make a step of any length.
"""

from typing import Any

import jax
import optax

from optax_mp.formats import _paths

# The fields of means and sums of squares: in most of Optax's states, and in
# those that use other names, or these names for something else.
_SQUARES = frozenset(
  {'nu', 'nu_max', 'e_g', 'e_x', 'sum_of_squares', 'exp_avg_sq'}
)
_OTHER_SQUARES = {
  optax.ScaleBySM3State: frozenset({'mu'}),
  optax.ScaleByAdanState: frozenset({'n'}),
  optax.FactoredState: frozenset({'v', 'v_row', 'v_col'}),
}


def are_squares(path: _paths.Path, tree: Any) -> bool:
  """Whether a leaf of a state is a mean or a sum of squares, by its name.

  Args:
    path: the state's part of the path of the leaf.
    tree: the state.
  """
  names, node = _SQUARES, tree
  for key in path:
    names = _OTHER_SQUARES.get(type(node), names)
    node = _child(node, key)
  return not names.isdisjoint(_paths.fields(path))


def without_signs(format: Any) -> Any:
  """The format for squares in place of ``format``: the same, but unsigned.

  A format whose values do not share a scale has no other one.
  """
  return getattr(format, 'without_signs', format)


def _child(node: Any, key: Any) -> Any:
  """The part of a node that one key of a path leads to, None if unknown."""
  match key:
    case jax.tree_util.GetAttrKey(name=name):
      return getattr(node, name, None)
    case jax.tree_util.SequenceKey(idx=index):
      return node[index]
    case jax.tree_util.DictKey(key=name):
      return node[name]
  return None
