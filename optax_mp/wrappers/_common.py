# SPDX-License-Identifier: Apache-2.0
"""What the wrappers share: float32 views, keys, and states laid out alike."""

from collections.abc import Callable
import functools
from typing import Any

import chex
import jax
from jax.experimental import shard_alike
import jax.numpy as jnp

from optax_mp import formats
from optax_mp.formats import _rounding


def to_float32(tree: Any) -> Any:
  """The tree with its 16-bit leaves widened to float32, exactly."""
  return jax.tree.map(widen, tree)


def widen(x: chex.Array) -> jax.Array:
  """One leaf of :func:`to_float32`; float32 and integers stay as they are."""
  x = jnp.asarray(x)
  if x.dtype in (jnp.bfloat16, jnp.float16):
    return _rounding.widen(x)
  return x


def new_key(seed: int) -> chex.PRNGKey:
  """Raw key data of ``seed``: Flax cannot serialize a typed key."""
  return jax.random.key_data(jax.random.key(seed, impl='threefry2x32'))


def check_seed(seed: Any) -> None:
  """Raises a ValueError unless ``seed`` is a Python integer."""
  if type(seed) is not int:
    raise ValueError(
      f'`seed` must be a Python int; got {seed!r}. Under '
      '`optax.inject_hyperparams` name it in `static_args`.'
    )


def next_key(rng_key: chex.PRNGKey) -> tuple[chex.PRNGKey, chex.PRNGKey]:
  """Raw key data -> (raw key data of the next step, a typed key for this)."""
  key = jax.random.wrap_key_data(rng_key, impl='threefry2x32')
  following, now = jax.random.split(key)
  return jax.random.key_data(following), now


def laid_out(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
  """Compiles ``build(params)``, each part sharded like its parameter.

  Compiled, because a state built operation by operation would exist in float32
  before it is stored. But a compiled program is free to put zeros on one
  device, so every array shaped like the parameter at the same path is told to
  be laid out like that.

  Args:
    build: makes a state from a pytree of arrays, the parameters.

  Returns:
    A compiled function that does the same.
  """

  def build_laid_out(params):
    leaves = dict(jax.tree_util.tree_leaves_with_path(params))

    def like_param(path, stored):
      for start in range(len(path) + 1):  # its longest suffix first
        param = leaves.get(path[start:])
        if param is not None:
          like = functools.partial(_lay_out, param=param)
          return jax.tree.map(like, stored)
      return stored

    return jax.tree_util.tree_map_with_path(
      like_param, build(params), is_leaf=formats.is_stored
    )

  return jax.jit(build_laid_out)


def _lay_out(x: chex.Array, param: chex.Array) -> chex.Array:
  """``x``, sharded like ``param`` if it has its shape."""
  if x.shape != param.shape:
    return x
  return shard_alike.shard_alike(param, x)[1]
