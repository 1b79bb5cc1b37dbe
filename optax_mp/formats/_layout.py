# SPDX-License-Identifier: Apache-2.0
"""Where the arrays of a state lie: where their parameters lie."""

import functools
from typing import Any

import chex
import jax
from jax import core
from jax import lax
import jax.numpy as jnp

from optax_mp.formats import _base
from optax_mp.formats import _paths


def lay_out(state: Any, params: Any) -> Any:
  """The state, its arrays sharded like the parameters that they belong to.

  A compiled program is free to put zeros on one device, so every array shaped
  like the parameter at the same path is told to be laid out like that.
  """
  leaves = dict(jax.tree_util.tree_leaves_with_path(params))
  owners = _paths.owners(state, leaves)

  def like_param(path, stored):
    param = leaves.get(owners[path])
    if param is None:
      return stored
    return jax.tree.map(functools.partial(lay_out_leaf, param=param), stored)

  return jax.tree_util.tree_map_with_path(
    like_param, state, is_leaf=_base.is_stored
  )


def lay_out_leaf(x: Any, param: Any) -> Any:
  """``x``, sharded like ``param`` if it has its shape.

  Outside of compiled functions an array that lies right is not copied.
  """
  if x.shape != param.shape:
    return x
  if isinstance(x, core.Tracer) or isinstance(param, core.Tracer):
    return lay_out_like(x, param)
  where = getattr(param, 'sharding', None)  # shapes alone have none
  return x if where is None else jax.device_put(x, where)


def lay_out_like(x: chex.Array, param: chex.Array) -> chex.Array:
  """``x``, sharded like an array of the same shape.

  The compiler lays out what is chosen from like what it is chosen from. That
  ``param`` is never chosen it must not know before. On a mesh with explicit
  axes it has nothing to decide. Zeros of a traced program are on no mesh: from
  JAX 0.12 on, those that are made like a parameter, too.
  """
  own = jax.typeof(x).sharding
  if own != jax.typeof(param).sharding and not own.mesh.empty:
    return x
  never = lax.optimization_barrier(jnp.zeros((), jnp.bool))
  return lax.select(never, lax.convert_element_type(param, x.dtype), x)
