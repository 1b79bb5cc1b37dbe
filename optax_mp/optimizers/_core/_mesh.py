# SPDX-License-Identifier: Apache-2.0
"""Operations that JAX does not follow on a mesh with explicit axes."""

from collections.abc import Callable
from typing import Any

import chex
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec


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
