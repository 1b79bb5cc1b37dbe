# SPDX-License-Identifier: Apache-2.0
"""Shardings of an optimizer's state, from the shardings of its parameters."""

from typing import Any

import jax
from jax.sharding import AbstractMesh
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import optax

from optax_mp._core import _boxes
from optax_mp.formats import _leaves
from optax_mp.formats import _paths


def state_shardings(
  tx: optax.GradientTransformation, params: optax.Params, shardings: Any
) -> Any:
  """Gives the shardings of a state, from the shardings of the parameters.

  Take it for ``jax.jit(tx.init, out_shardings=...)``, for ``jax.device_put``
  and for the abstract target of an Orbax restore. A plain ``tx.init(params)``
  needs no help: if the parameters are sharded, its state is sharded like this.

  Args:
    tx: any transformation, of this library or of Optax.
    params: the parameters, or their shapes and dtypes.
    shardings: a tree like ``params`` of ``NamedSharding``, or one sharding for
      all parameters.

  Returns:
    A tree of shardings like ``tx.init(params)``. Arrays with a parameter's
    shape are sharded like the parameter. Other arrays are sharded along the
    axes that they share with it, as on a mesh with explicit axes: rows like
    rows, block scales like columns if no block is cut. All other axes are
    replicated.

  Raises:
    ValueError: if ``shardings`` has another structure than ``params``, contains
      anything but shardings, or contains shardings of several meshes.

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
  params = _leaves.checked(params, 'params')
  bare = _boxes.unbox(params)
  places = _places(_boxes.unbox(shardings), bare)
  state = jax.eval_shape(tx.init, params)
  if places and isinstance(places[0], NamedSharding):
    found = _as_explicit(tx, bare, places)
  else:
    whole = places[0] if places else None
    found = [whole] * len(jax.tree.leaves(state))
  return jax.tree.structure(state).unflatten(found)


def _as_explicit(tx: Any, params: Any, places: list[Any]) -> list[Any]:
  """The shardings that the state's arrays would have on explicit axes.

  On such a mesh JAX follows each axis through the program of ``tx.init``.
  Nothing is compiled, and no device is needed.
  """
  mesh = places[0].mesh
  kinds = (AxisType.Explicit,) * len(mesh.axis_names)
  explicit = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=kinds)
  placed = [
    jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(explicit, place.spec)
    )
    for x, place in zip(jax.tree.leaves(params), places, strict=True)
  ]
  with jax.sharding.use_abstract_mesh(explicit):
    state = jax.eval_shape(
      tx.init, jax.tree.structure(params).unflatten(placed)
    )
  return [
    NamedSharding(mesh, x.sharding.spec if x.sharding else PartitionSpec())
    for x in jax.tree.leaves(state)
  ]


def _places(shardings: Any, params: Any) -> list[Any]:
  """The sharding of each parameter, in the order of the leaves."""
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
  if len({getattr(place, 'mesh', place) for place in places}) > 1:
    raise ValueError(
      '`shardings` must be of one mesh, since each array of the state lies on '
      'the mesh of the parameters; got several.'
    )
  return places
