# SPDX-License-Identifier: Apache-2.0
"""Where the arrays of an optimizer's state lie on a mesh."""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import optax

from optax_mp import formats
from optax_mp._core import _boxes
from optax_mp.formats import _axes
from optax_mp.formats import _paths


def state_shardings(
  tx: optax.GradientTransformation, params: optax.Params, shardings: Any
) -> Any:
  """The shardings of a state, given those of the parameters.

  Take it for ``jax.jit(tx.init, out_shardings=...)``, for ``jax.device_put``
  and for the abstract target of an Orbax restore. ``tx.init(params)`` on
  sharded parameters lies like this without it.

  Args:
    tx: any transformation, of this library or of Optax.
    params: the parameters, or their shapes and dtypes.
    shardings: a tree like ``params`` of ``NamedSharding``, or one sharding for
      all parameters.

  Returns:
    A tree of shardings like ``tx.init(params)``. Arrays with a parameter's
    shape lie like the parameter. An axis of another array is cut like the axis
    of the parameter that it follows: rows like rows, block scales like columns
    where whole blocks remain. All other axes are replicated.

  Raises:
    ValueError: if ``shardings`` has another structure than ``params`` or holds
      something else than shardings.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_mp
    >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    >>> mesh = jax.make_mesh((1,), ('d',), axis_types=(AxisType.Auto,))
    >>> params = {'w': jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)}
    >>> where = {'w': NamedSharding(mesh, P('d', None))}
    >>> tx = optax_mp.adamw_8bit(1e-3)
    >>> state = optax_mp.state_shardings(tx, params, where)
    >>> mu = state.inner_state.inner_state[0].mu['w']
    >>> print(mu.codes.spec == mu.scales.spec == P('d', None))
    True
  """
  bare = _boxes.unbox(params)
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(bare)]
  places = _places(_boxes.unbox(shardings), bare)
  params_at = dict(zip(paths, jax.tree.leaves(bare), strict=True))
  place_at = dict(zip(paths, places, strict=True))
  state = jax.eval_shape(tx.init, params)
  alone = _boxes.unbox(state)
  owners = _paths.owners(alone, paths)
  elsewhere = _replicated(places)

  def place(path, stored):
    param = params_at.get(owners[path])
    if param is None:
      return jax.tree.map(lambda _: elsewhere, stored)
    where = place_at[owners[path]]
    return jax.tree.map(lambda x: _follow(where, param.shape, x.shape), stored)

  found = jax.tree_util.tree_map_with_path(
    place, alone, is_leaf=formats.is_stored
  )
  return jax.tree.structure(state).unflatten(jax.tree.leaves(found))


def _places(shardings: Any, params: Any) -> list[Any]:
  """The sharding of each parameter, in their order."""
  treedef = jax.tree.structure(params)
  if isinstance(shardings, jax.sharding.Sharding):
    return [shardings] * treedef.num_leaves
  places = _paths.flatten_like(treedef, shardings, 'shardings', 'params')
  for place in places:
    if not isinstance(place, jax.sharding.Sharding):
      raise ValueError(
        f'`shardings` must be a tree of shardings like `params`; got {place!r}.'
        ' A PartitionSpec becomes one by `NamedSharding(mesh, spec)`.'
      )
  return places


def _replicated(places: list[Any]) -> Any:
  """Where counters and other arrays lie that belong to no parameter."""
  for place in places:
    if isinstance(place, NamedSharding):
      return NamedSharding(place.mesh, PartitionSpec())
  return places[0] if places else None


def _follow(place: Any, shape: Any, own_shape: Any) -> Any:
  if not isinstance(place, NamedSharding) or own_shape == shape:
    return place

  def can_cut(length, axes):
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return length % math.prod(place.mesh.shape[axis] for axis in axes) == 0

  spec = _axes.follow(tuple(place.spec), shape, own_shape, can_cut)
  return NamedSharding(place.mesh, PartitionSpec(*spec))
