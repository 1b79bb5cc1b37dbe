# SPDX-License-Identifier: Apache-2.0
"""One parameter and its residual: join them, step, and cut them again."""

import functools
from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp
import optax

from optax_mp import formats
from optax_mp._core import _derivatives
from optax_mp.formats import _base
from optax_mp.formats import _paths
from optax_mp.formats import _tree
from optax_mp.wrappers import _common


def format_of(
  dtype: Any, residual_bits: Any, rounding: Any = None
) -> formats.Format | None:
  """The format of a parameter and its residual; None for float32."""
  if dtype == jnp.bfloat16:
    split, alone = formats.Split, formats.BFloat16
  elif dtype == jnp.float16:
    split, alone = formats.SplitFloat16, formats.Float16
  else:
    return None
  if residual_bits == 0:
    return alone(rounding or 'stochastic')
  # An update far below the last of 24 bits must count on average: lr decays.
  default = 'nearest' if residual_bits == 16 else 'stochastic'
  return split(residual_bits, rounding or default)


def bits_of(residual: Any) -> int:
  """16, 8 or, where there is no array, 0."""
  has_bits = hasattr(residual, 'dtype')
  return _base.dtype_bits(residual.dtype) if has_bits else 0


@functools.cache
def dtype_of(param_dtype: Any, residual_bits: int) -> Any:
  """The dtype of a parameter's residual; None where it has none."""
  format = format_of(param_dtype, residual_bits)
  if format is None or residual_bits == 0:
    return None
  return _base.stored_like(format, (), jnp.dtype(jnp.float32)).low.dtype


def no_error(param: chex.Array, residual_bits: int) -> Any:
  """The residual of a parameter that is exactly what it should be: zeros."""
  dtype = dtype_of(jnp.dtype(param.dtype), residual_bits)
  if dtype is None:
    return optax.EmptyState()
  return jnp.zeros_like(param, dtype)


def check_fits(
  path: Any, param: Any, residual: Any, residual_bits: int
) -> None:
  """Raises a ValueError unless the residual is one of this parameter's."""
  expected = dtype_of(jnp.dtype(param.dtype), residual_bits)
  found = getattr(residual, 'dtype', None)
  shape = getattr(residual, 'shape', param.shape)
  if found != expected or shape != param.shape:
    raise ValueError(
      f'`params` has {param.dtype}{param.shape} at {_paths.path_str(path)!r}, '
      f'which needs a residual of {expected or "none"}, but the state holds '
      f'{f"{found}{shape}" if found else "none"}: dtype, shape or '
      '`residual_bits` changed since `init`. Call `init` again, or convert '
      'with `checkpoint.to_float32` and `checkpoint.from_float32`.'
    )


def join(param: chex.Array, residual: Any) -> chex.Array:
  """The float32 weight that a parameter and its residual stand for."""
  bits = bits_of(residual)
  if bits == 0:
    return _common.widen(param)
  format = format_of(param.dtype, bits)
  assert format is not None  # `check_fits` has compared the dtypes
  like = jax.ShapeDtypeStruct(param.shape, jnp.float32)
  return _tree.decode(format, formats.HighLow(param, residual), like)


def cut(stored: Any) -> tuple[chex.Array, Any]:
  """What a format stored -> (parameter, residual)."""
  if formats.is_stored(stored):
    return stored.high, stored.low
  return stored, optax.EmptyState()


# Compiled apart, so that each shape is traced once, however many leaves.
@functools.partial(jax.jit, static_argnums=0)
def step(
  format: formats.Format,
  param: chex.Array,
  weight: chex.Array,
  key: chex.PRNGKey,
) -> tuple[chex.Array, Any]:
  """One leaf: the new float32 weight -> (update, residual)."""
  weight = _derivatives.refused(weight)
  target, residual = cut(format.encode(weight, key))
  return _difference(target, param), residual


def _difference(target: chex.Array, param: chex.Array) -> jax.Array:
  """The float32 number that `optax.apply_updates` adds to land on ``target``.

  It lands where ``target - param`` fits into the 24 bits of a float32: where
  ``target`` has at most 16 binary places less than ``param``, both with the 8
  significant bits of bfloat16 (float16: 13 and 11). Elsewhere it may miss by a
  float32 rounding error of ``param``, far below the residual's reach.

  Where nothing changes it is -0.0: the one number that leaves every float as it
  is, -0.0 among them, and infinity - infinity is never computed.
  """
  difference = _common.widen(target) - _common.widen(param)
  return jnp.where(_same_bits(target, param), -0.0, difference)


def _same_bits(x: chex.Array, y: chex.Array) -> jax.Array:
  as_integers = [lax.bitcast_convert_type(z, jnp.uint16) for z in (x, y)]
  return as_integers[0] == as_integers[1]
