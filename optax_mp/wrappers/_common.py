# SPDX-License-Identifier: Apache-2.0
"""What the wrappers share: float32 views, keys, and states laid out alike."""

from collections.abc import Callable
from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp
import optax

from optax_mp._core import _derivatives
from optax_mp.formats import _base
from optax_mp.formats import _layout
from optax_mp.formats import _rounding


def to_float32(tree: Any) -> Any:
  """The tree with its 16-bit leaves widened to float32, exactly."""
  return jax.tree.map(widen, tree)


def widen(x: Any) -> Any:
  """One leaf of :func:`to_float32`; float32 and integers stay as they are."""
  if x.dtype in (jnp.bfloat16, jnp.float16):
    return _rounding.widen(_derivatives.refused(jnp.asarray(x)))
  return x


def noise_key(
  seed: int, count: chex.Array, layer: chex.Array | None = None
) -> chex.PRNGKey:
  """The key of one step's noise: a typed key of two words, seed and step.

  Of them only the count is in the state. The seed is a constant of the program,
  and with it the key of every leaf but for the count: a small array of its own
  for each leaf makes XLA:TPU set memory aside for every kernel around it.

  Args:
    seed: of the wrapper.
    count: a scalar, uint32.
    layer: a scalar, uint32: the number of a layer in a stack, whose state is
      updated layer by layer; of equal paths and counts its noise is its own.

  Returns:
    A key for ``formats._rounding.random_bits``.
  """
  word = jnp.uint32(seed)
  if layer is not None:
    # Mixed, so that no layer has the noise of another one a few values on; plus
    # one, because 0 stays 0, and this is no layer's but the rest's.
    word ^= _rounding.mix(jnp.uint32(1) + layer)
  words = jnp.stack([word, count])
  return jax.random.wrap_key_data(words, impl='threefry2x32')


def checked(
  inner: Any, seed: Any
) -> tuple[optax.GradientTransformationExtraArgs, int]:
  """``inner`` with extra arguments and ``seed``, or a ValueError."""
  if not (hasattr(inner, 'init') and hasattr(inner, 'update')):
    raise ValueError(
      '`inner` must be an Optax transformation such as `optax.adam(1e-3)`; got '
      f'{inner!r}.'
    )
  _base.check_static(seed, 'seed')
  if not _base.is_integer(seed) or not 0 <= int(seed) < 2**32:
    raise ValueError(
      f'`seed` must be an integer from 0 to 2**32 - 1; got {seed!r}.'
    )
  return optax.with_extra_args_support(inner), int(seed)


def check_min_size(min_size: Any) -> None:
  """Raises a ValueError unless it is a number of values."""
  _base.check_static(min_size, 'min_size')
  if not _base.is_integer(min_size) or min_size < 0:
    raise ValueError(
      f'`min_size` must be an integer, 0 or more; got {min_size!r}.'
    )


def check_state(state: Any, expected: type[Any]) -> None:
  """Raises a ValueError unless ``state`` is the wrapper's own."""
  if not isinstance(state, expected):
    raise ValueError(
      f'`state` must be the {expected.__name__} that `init` returned; got a '
      f'{type(state).__name__}. A checkpoint is restored into '
      '`jax.eval_shape(tx.init, params)`, so that containers keep their types; '
      '`checkpoint.rebuild(tx, params, tree)` makes a state of plain dicts.'
    )


def laid_out(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
  """Compiles ``build(params)``, each part sharded like its parameter.

  Compiled, because a state built operation by operation would exist in float32
  before it is stored.

  Args:
    build: makes a state from a pytree of arrays, the parameters.

  Returns:
    A compiled function that does the same.
  """

  def build_laid_out(params):
    return _layout.lay_out(build(params), params)

  return jax.jit(build_laid_out)


def not_constant(state: Any) -> Any:
  """The state, plus a zero that XLA does not know to be one.

  Else it finds the scales of a state full of zeros when it compiles, number by
  number, which for a large matrix takes long.
  """
  zero = lax.optimization_barrier(jnp.zeros((), jnp.float32))

  def add(x):
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return x + zero.astype(x.dtype) if is_float else x

  return jax.tree.map(add, state)
