# SPDX-License-Identifier: Apache-2.0
"""Operations that JAX does not follow on a mesh with explicit axes."""

from collections.abc import Callable
from typing import Any

import chex
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import optax


def automatic(
  fn: Callable[..., Any], *args: Any, like: chex.Array, axes: Any
) -> Any:
  """``fn(*args)``, on an explicit mesh as if its axes were automatic.

  Args:
    fn: of arrays, to an array or a tuple of arrays.
    *args: for it, trees of arrays.
    like: a parameter or gradient; elsewhere than on an explicit mesh nothing is
      done.
    axes: of the result: for each of its axes one of ``like``, like which it is
      sharded, or None; a list of such tuples for a tuple of arrays.

  Returns:
    What ``fn`` does.
  """
  sharding = jax.typeof(like).sharding
  mesh = sharding.mesh
  if mesh.empty or not mesh.explicit_axes:
    return fn(*args)

  def place(axes):
    spec = (None if i is None else sharding.spec[i] for i in axes)
    return NamedSharding(mesh, PartitionSpec(*spec))

  wanted = tuple(map(place, axes)) if isinstance(axes, list) else place(axes)
  inside = jax.sharding.auto_axes(
    fn, axes=mesh.explicit_axes, out_sharding=wanted
  )
  return inside(*args)


def automatic_update(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """``tx``, on an explicit mesh as if its axes were automatic.

  Args:
    tx: a transformation with operations that JAX does not follow there, such as
      products of a gradient with itself.

  Returns:
    A transformation whose updates lie like the gradients and whose state stays
    where it is.
  """
  tx = optax.with_extra_args_support(tx)

  def update_fn(updates, state, params=None, **extra_args):
    types = [jax.typeof(x).sharding for x in jax.tree.leaves(updates)]
    explicit = [t.mesh for t in types if t.mesh.explicit_axes]
    if not explicit:
      return tx.update(updates, state, params, **extra_args)
    mesh = explicit[0]

    def update(updates, state, params):
      return tx.update(updates, state, params, **extra_args)

    wanted = jax.tree.map(
      lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec),
      (updates, state),
    )
    inside: Any = jax.sharding.auto_axes(
      update, axes=mesh.explicit_axes, out_sharding=wanted
    )
    return inside(updates, state, params)

  return optax.GradientTransformationExtraArgs(tx.init, update_fn)
