# SPDX-License-Identifier: Apache-2.0
"""One parameter and its residual: join them, step, and cut them again."""

import functools
from typing import Any, NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp
import optax

from optax_mp import formats
from optax_mp._core import _derivatives
from optax_mp.formats import _base
from optax_mp.formats import _containers
from optax_mp.formats import _names
from optax_mp.formats import _paths
from optax_mp.formats import _tree
from optax_mp.wrappers import _common

_SPLITS = (formats.Split, formats.SplitFloat16)


def format_of(
  dtype: Any, residual_bits: Any, rounding: Any = None
) -> formats.Format | None:
  """The format of a parameter and its residual; None for other dtypes."""
  if dtype == jnp.bfloat16:
    split, alone = formats.Split, formats.BFloat16
  elif dtype == jnp.float16:
    split, alone = formats.SplitFloat16, formats.Float16
  else:
    return None
  if residual_bits == 0:
    return alone(rounding or 'stochastic')
  # Updates far below the last of 24 bits must count on average, since learning
  # rates decay.
  default = 'nearest' if residual_bits == 16 else 'stochastic'
  return split(residual_bits, rounding or default)


@formats.Stored.register
class Residual(NamedTuple):
  """The rounding error of a parameter; ``low.shape == param.shape``.

  In a state the field's name contains the format's, as ``low__Split_16_v2``.
  """

  low: chex.Array  # [u]int16 or [u]int8


@formats.Stored.register
class NoResidual(NamedTuple):
  """A 16-bit parameter whose rounding error is not kept."""


def format_in(residual: Any) -> formats.Format | None:
  """The format of a parameter and its residual, by the residual's name."""
  name = _names.name_in(residual)
  known = (kind(bits) for kind in _SPLITS for bits in (16, 8))
  return next((f for f in known if _names.name_of(f) == name), None)


def is_residual(x: Any) -> bool:
  """True for the residual of one parameter, known by its type or its name."""
  return isinstance(x, (Residual, NoResidual)) or format_in(x) is not None


def bits_of(residual: Any) -> int:
  """The bits of a residual: 16, 8, or 0 if no rounding error is kept."""
  low = jax.tree.leaves(residual)
  return _base.dtype_bits(low[0].dtype) if low else 0


@functools.cache
def like(param_dtype: Any, shape: Any, residual_bits: int) -> Any:
  """The residual of a parameter as a state keeps it, in shapes and dtypes."""
  format = format_of(param_dtype, residual_bits)
  if format is None:
    return optax.EmptyState()
  if residual_bits == 0:
    return NoResidual()
  stored = _base.stored_like(format, shape, jnp.dtype(jnp.float32))
  return _names.named(format, Residual(stored.low))


def no_error(param: chex.Array, residual_bits: int) -> Any:
  """The residual of a parameter without a rounding error: zeros."""
  expected = like(param.dtype, param.shape, residual_bits)
  return jax.tree.map(lambda x: jnp.zeros_like(param, x.dtype), expected)


def fitting(path: Any, param: Any, residual: Any, residual_bits: int) -> Any:
  """The residual, or a ValueError if it does not fit the parameter."""
  expected = like(param.dtype, param.shape, residual_bits)
  found = _containers.as_stored(residual, expected)
  if _tree.layout(found) != _tree.layout(expected):
    raise ValueError(
      f'`params` has {param.dtype}{param.shape} at {_paths.path_str(path)!r}, '
      f'which needs a residual of {_text(expected)}, but the state holds '
      f'{_text(residual)}: dtype, shape or `residual_bits` changed since '
      '`init`. If adding updates made the parameters float32, add them with '
      '`optax.apply_updates`, which keeps the dtype, or cast the sum. Call '
      '`init` again for other parameters, and for another setting convert the '
      'state with `checkpoint.convert(old_tx, new_tx, state, params)`.'
      + _names.hint(residual)
    )
  return found


def _text(residual: Any) -> str:
  if isinstance(residual, NoResidual):
    return 'no bits, of a 16-bit parameter'
  return _tree.text(residual) if jax.tree.leaves(residual) else 'none'


def join(param: chex.Array, residual: Any) -> chex.Array:
  """The float32 weight that a parameter and its residual stand for."""
  format = format_in(residual)
  if format is None:
    return _common.widen(param)
  shape = jax.ShapeDtypeStruct(param.shape, jnp.float32)
  return _tree.decode(format, formats.HighLow(param, residual.low), shape)


def cut(format: formats.Format, stored: Any) -> tuple[chex.Array, Any]:
  """A weight that a format stored -> (parameter, residual)."""
  if formats.is_stored(stored):
    return stored.high, _names.named(format, Residual(stored.low))
  return stored, NoResidual()


# Compiled by itself, so that each shape is traced once and not once per leaf.
@functools.partial(jax.jit, static_argnums=0)
def step(
  format: formats.Format,
  param: chex.Array,
  weight: chex.Array,
  key: chex.PRNGKey,
) -> tuple[chex.Array, Any]:
  """One leaf: the new float32 weight -> (update, residual)."""
  weight = _derivatives.refused(weight)
  target, residual = cut(format, format.encode(weight, key))
  return _difference(target, param), residual


def _difference(target: chex.Array, param: chex.Array) -> jax.Array:
  """The float32 number with which `optax.apply_updates` reaches ``target``.

  It does so if ``target - param`` fits into the 24 bits of a float32. Both have
  8 significant bits in bfloat16, so ``target`` may be up to 16 binary places
  smaller than ``param`` (float16: 11 bits, 13 places). If it is smaller still,
  the sum may miss ``target`` by a float32 rounding error of ``param``.

  If nothing changes, it is -0.0, the one number that leaves every float as it
  is, even -0.0. An infinity minus itself is then not used either.
  """
  difference = _common.widen(target) - _common.widen(param)
  return jnp.where(_same_bits(target, param), -0.0, difference)


def _same_bits(x: chex.Array, y: chex.Array) -> jax.Array:
  as_integers = [lax.bitcast_convert_type(z, jnp.uint16) for z in (x, y)]
  return as_integers[0] == as_integers[1]
