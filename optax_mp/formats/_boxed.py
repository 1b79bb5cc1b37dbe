# SPDX-License-Identifier: Apache-2.0
"""States of boxed parameters: each array has a box of its own.

Optax maps over trees with boxes, so every array of its state gets the names of
its parameter's axes. They are wrong if the array has another shape: a row of
scales cannot be sharded like a kernel. Therefore transformations of this
library see arrays without boxes. Each array of their state then gets a box of
its own, with the names of the axes that it shares with its parameter.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import optax

from optax_mp._core import _boxes
from optax_mp.formats import _axes
from optax_mp.formats import _base
from optax_mp.formats import _paths

# Metadata in which Variables name axes; the second is only for optimizers.
_SHARDINGS = ('out_sharding', 'optimizer_sharding', 'sharding_names')


def box_state(state: Any, params: Any) -> Any:
  """Puts each array that belongs to a boxed parameter into a box of its own.

  Args:
    state: the state, without boxes.
    params: the parameters, all or some of them boxed.

  Returns:
    The state. Each array of a boxed parameter is in a box of the same kind,
    with the names of the array's own axes.
  """
  nodes = jax.tree.leaves(params, is_leaf=_boxes.is_box)
  paths = [
    p for p, _ in jax.tree_util.tree_leaves_with_path(_boxes.unbox(params))
  ]
  boxes = dict(zip(paths, nodes, strict=True))
  owners = _paths.owners(state, paths)

  def own(path, stored):
    box = boxes.get(owners[path])
    if not _boxes.is_box(box):
      return stored
    return jax.tree.map(functools.partial(_own_box, box), stored)

  return jax.tree_util.tree_map_with_path(own, state, is_leaf=_base.is_stored)


def transparent(
  tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  """Lets ``tx`` take trees with boxes; it sees the arrays without them.

  Args:
    tx: a transformation of trees of arrays.

  Returns:
    A transformation whose updates are boxed like the gradients, and whose state
    has a box for each array of a boxed parameter.
  """

  def init_fn(params):
    if not _boxes.has_boxes(params):
      return tx.init(params)
    return box_state(tx.init(_boxes.unbox(params)), params)

  def update_fn(updates, state, params=None, **extra_args):
    if not _boxes.has_boxes(updates, state, params):
      return tx.update(updates, state, params, **extra_args)
    new_updates, new_state = tx.update(
      _boxes.unbox(updates),
      _boxes.unbox(state),
      _boxes.unbox(params),
      **extra_args,
    )
    return _boxes.box_like(updates, new_updates), _boxes.box_like(
      state, new_state
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _own_box(box: Any, x: Any) -> Any:
  """``x`` in a box like its parameter's, with the names of its own axes."""
  param = jax.tree.leaves(box)[0]
  own = _boxes.with_value(box, x)
  if x.shape == param.shape:
    return own

  def follow(names):
    names = tuple(names)
    known = _axes.known(names, param, x)
    return tuple(known or _axes.follow(names, param.shape, x.shape))

  if hasattr(type(box), _boxes.NNX[0]):
    return _rename_variable(own, follow)
  if not hasattr(box, 'names'):  # a user's own box, which we cannot rename
    return x
  return dataclasses.replace(own, names=follow(box.names))


def _rename_variable(variable: Any, follow: Callable[[Any], Any]) -> Any:
  """The Variable, with the names that ``follow`` gives in its shardings."""
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
