# SPDX-License-Identifier: Apache-2.0
"""Second moments get unsigned formats.

Most optimizers divide by the root of a second moment. A signed format would
round small values beside large ones to zero, and store a huge value as the
largest of the others. The root would be far too small, and the step of the
weight arbitrarily long.
"""

from typing import Any

import jax

from optax_mp.formats import _paths

# Fields that hold means or sums of squares, in most states of Optax and of this
# library.
_SQUARES = frozenset(
  {
    *('nu', 'nu_max', 'nu_row', 'nu_col', 'res_row', 'res_col'),
    *('e_g', 'e_x', 'exp_avg_sq', 'grad_sum_sq', 'sum_of_squares'),
  }
)
# States whose names for them differ, or mean something else.
_OTHER_SQUARES = {
  'FactoredState': frozenset({'v', 'v_row', 'v_col'}),
  'ScaleByAdanState': frozenset({'n'}),
  'ScaleBySM3State': frozenset({'mu'}),
  'ScaleBySimplifiedAdEMAMixState': frozenset({'n'}),
  'SophiaState': frozenset(),  # its `nu` is a mean of second derivatives
}


def are_squares(path: _paths.Path, tree: Any) -> bool:
  """Whether a leaf of a state is a mean or a sum of squares, by its name.

  The states of other people may call anything by these names: the answer is
  False for them.

  Args:
    path: the path of the leaf within the state.
    tree: the state.
  """
  node = tree
  for key in path:
    if getattr(key, 'name', None) in _squares_of(type(node)):
      return True
    node = _child(node, key)
  return False


def _squares_of(state: type) -> frozenset[str]:
  """The fields of a type of states that hold squares."""
  package, *_ = state.__module__.split('.')
  if package not in ('optax', 'optax_mp'):
    return frozenset()
  return _OTHER_SQUARES.get(state.__name__, _SQUARES)


def without_signs(format: Any) -> Any:
  """The unsigned form of ``format``, which stores squares.

  A format without a shared scale is returned unchanged.
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
