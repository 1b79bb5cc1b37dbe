# SPDX-License-Identifier: Apache-2.0
"""Parameters in 16 bits, what rounding removes in the optimizer's state."""

import functools
from typing import Any, NamedTuple
import warnings

import chex
import jax
from jax import lax
import jax.numpy as jnp
import optax

from optax_mp import formats
from optax_mp.formats import _base
from optax_mp.formats import _tree
from optax_mp.wrappers import _common


class CompensatedState(NamedTuple):
  """The inner state and the residuals of the parameters."""

  inner_state: optax.OptState
  residual: chex.ArrayTree  # like params: [u]int16 or [u]int8, or EmptyState()
  rng_key: chex.Array  # (2,), uint32: key data for the next step's noise


def compensated(
  inner: optax.GradientTransformation,
  residual_bits: int = 16,
  *,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Trains 16-bit parameters as if they were float32.

  **Stored:** for each bfloat16 or float16 parameter a residual of
  ``residual_bits`` bits: 2, 1 or 0 bytes beside the parameter's 2. float32
  parameters pass through untouched.

  With p the parameter, e its residual, and ``Split`` as the format, one step is

  .. math::
    w &= \mathrm{join}(p, e), \\
    w' &= w + \mathrm{inner}(g, s, w), \\
    p', e' &= \mathrm{split}(w'), \\
    \mathrm{update} &= p' - p \quad\text{(float32)}.

  The inner transformation sees float32 gradients and the float32 weights w, so
  weight decay is compensated too, and everything that changes weights must be
  inside ``inner``: nothing may come after ``compensated`` in a chain.
  ``optax.apply_updates(params, updates)`` lands on p' bit for bit.

  Args:
    inner: any Optax transformation, :func:`compressed` ones among them.
    residual_bits: 16, exact: the same bits as training in float32 (float16: for
      abs(w) from 6.1e-5 to 65504); 8, a master of 24 bits (16 significant),
      stochastically rounded; 0, no residual, stochastically rounded parameters.
    seed: for the stochastic rounding.

  Returns:
    A transformation; its updates for 16-bit parameters are float32.

  Raises:
    ValueError: for other ``residual_bits``; in ``update``, without ``params``,
      or with parameters of other dtypes or structure than in ``init``.

  Warns:
    UserWarning: in ``init``, if no parameter has 16 bits.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optax_mp
    >>> def train(tx, params):
    ...   state = tx.init(params)
    ...   for _ in range(100):
    ...     updates, state = tx.update(jnp.ones_like(params), state, params)
    ...     params = optax.apply_updates(params, updates)
    ...   return params
    >>> weight = jnp.ones((), jnp.bfloat16)
    >>> print(train(optax.sgd(1e-3), weight))
    1
    >>> print(train(optax_mp.compensated(optax.sgd(1e-3)), weight))
    0.898438

  **Savings:** 4 bytes per parameter where a float32 master and its bfloat16
  copy take 6; 3 or 2 with fewer residual bits.

  **Caveats:** where a weight shrinks more than 65536-fold in one step, p +
  (p' - p) may miss p' by a float32 rounding error of p; the residual is then
  dropped, so that it always belongs to the value the model has.
  ``optax.apply_if_finite`` needs updates of the gradients' dtype: give it
  float32 gradients, or put it inside, ``compensated(apply_if_finite(inner))``.

  References:
    Lewandowski and Kosson, `Memory Efficient Mixed-Precision Optimizers
    <https://arxiv.org/abs/2309.12381>`_, 2023;
    Zamirai et al., `Revisiting BFloat16 Training
    <https://arxiv.org/abs/2010.06192>`_, 2020
  """
  _base.check_choice(residual_bits, 'residual_bits', (16, 8, 0))
  _common.check_seed(seed)
  inner = optax.with_extra_args_support(inner)

  @_common.laid_out
  def build(params):
    residual = jax.tree.map(lambda p: _no_error(p, residual_bits), params)
    return inner.init(_common.to_float32(params)), residual

  def init_fn(params):
    _check_halves(params)
    inner_state, residual = build(params)
    return CompensatedState(inner_state, residual, _common.new_key(seed))

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError(
        '`params` is None, but `compensated` joins the parameters with their '
        'residuals. Call `update(updates, state, params)`.'
      )
    treedef, leaves, residuals = _flatten(params, state.residual, residual_bits)
    _tree.flatten_like(treedef, updates, 'updates', 'params')
    masters = [join(p, e) for p, e in zip(leaves, residuals, strict=True)]
    deltas, inner_state = inner.update(
      _common.to_float32(updates),
      state.inner_state,
      treedef.unflatten(masters),
      **extra_args,
    )
    rng_key, now = _common.next_key(state.rng_key)
    keys = jax.random.split(now, max(1, len(leaves)))
    steps = [
      _step(format_of(p.dtype, residual_bits), p, w + d.astype(w.dtype), d, key)
      for p, w, d, key in zip(
        leaves, masters, treedef.flatten_up_to(deltas), keys, strict=False
      )
    ]
    new_updates = treedef.unflatten(update for update, _ in steps)
    residual = treedef.unflatten(residual for _, residual in steps)
    return new_updates, CompensatedState(inner_state, residual, rng_key)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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


def join(param: chex.Array, residual: Any) -> chex.Array:
  """The float32 weight that a parameter and its residual stand for."""
  if not hasattr(residual, 'dtype'):
    return _common.widen(param)
  bits = _base.dtype_bits(residual.dtype)
  format = format_of(param.dtype, bits)
  assert format is not None  # `_flatten` has compared the dtypes
  like = jax.ShapeDtypeStruct(param.shape, jnp.float32)
  return _tree.decode(format, formats.HighLow(param, residual), like)


def nearest_format(dtype: Any, residual: Any) -> formats.Format:
  """The format of a parameter and its residual, without stochastic rounding."""
  bits = _base.dtype_bits(residual.dtype) if hasattr(residual, 'dtype') else 0
  format = format_of(dtype, bits, 'nearest')
  assert format is not None  # only 16-bit parameters are asked for
  return format


def cut(stored: Any) -> tuple[chex.Array, Any]:
  """What a format stored -> (parameter, residual)."""
  if formats.is_stored(stored):
    return stored.high, stored.low
  return stored, optax.EmptyState()


# Compiled apart, so that each shape is traced once, however many leaves.
@functools.partial(jax.jit, static_argnums=0)
def _step(
  format: formats.Format | None,
  param: chex.Array,
  weight: chex.Array,
  delta: chex.Array,
  key: chex.PRNGKey,
) -> tuple[chex.Array, Any]:
  """One leaf: the new weight -> (update, residual)."""
  if format is None:
    return delta, optax.EmptyState()
  rounded = _common.widen(weight.astype(param.dtype))
  weight = jnp.where(_lands(weight, param), weight, rounded)
  target, residual = cut(format.encode(weight, key))
  return _difference(target, param), residual


def _lands(weight: chex.Array, param: chex.Array) -> jax.Array:
  """Where p + (p' - p), in float32, is p' for certain.

  It is where p' - p fits into the 24 bits of a float32: where p' has at most 16
  binary places less than p, with the 8 significant bits of bfloat16 (float16:
  13 and 11). Very small numbers are flushed to zero by the hardware. Elsewhere
  the weight is rounded to what the parameter can hold: then its residual is 0,
  which is right for whatever value the sum has.
  """
  shift = 2.0 ** (23 - jnp.finfo(param.dtype).nmant)
  size = jnp.maximum(jnp.abs(_common.widen(param)), 1e-30)
  return jnp.abs(weight) * shift >= size


def _difference(target: chex.Array, param: chex.Array) -> jax.Array:
  """The float32 number that `optax.apply_updates` adds to land on ``target``.

  Where nothing changes it is -0.0: the one number that leaves every float as it
  is, -0.0 among them, and infinity - infinity is never computed.
  """
  difference = _common.widen(target) - _common.widen(param)
  return jnp.where(_same_bits(target, param), -0.0, difference)


def _same_bits(x: chex.Array, y: chex.Array) -> jax.Array:
  as_integers = [lax.bitcast_convert_type(z, jnp.uint16) for z in (x, y)]
  return as_integers[0] == as_integers[1]


def _no_error(param: chex.Array, residual_bits: int) -> Any:
  """The residual of a parameter that is exactly what it should be: zeros."""
  dtype = _residual_dtype(param.dtype, residual_bits)
  if dtype is None:
    return optax.EmptyState()
  return jnp.zeros_like(param, dtype)


@functools.cache
def _residual_dtype(param_dtype: Any, residual_bits: int) -> Any:
  format = format_of(param_dtype, residual_bits)
  if format is None or residual_bits == 0:
    return None
  x = jax.ShapeDtypeStruct((), jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(format.encode, x, key).low.dtype


def _flatten(params: Any, residual: Any, residual_bits: int):
  """The leaves of both trees, once they fit together."""
  leaves, treedef = jax.tree.flatten(params)
  residuals = _tree.flatten_like(treedef, residual, 'state', 'params')
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  for path, leaf, stored in zip(paths, leaves, residuals, strict=True):
    expected = _residual_dtype(leaf.dtype, residual_bits)
    found = getattr(stored, 'dtype', None)
    if found != expected or getattr(stored, 'shape', leaf.shape) != leaf.shape:
      raise ValueError(
        f'`params` has {leaf.dtype}{leaf.shape} at {_tree.path_str(path)!r}, '
        f'which needs a residual of {expected or "none"}, but the state holds '
        f'{found or "none"}: dtype, shape or `residual_bits` changed since '
        '`init`. Call `init` again, or convert with `checkpoint.to_float32` '
        'and `checkpoint.from_float32`.'
      )
  return treedef, leaves, residuals


def _check_halves(params: Any) -> None:
  """Says so if there is nothing to compensate."""
  leaves = jax.tree.leaves(params)
  if leaves and not any(format_of(leaf.dtype, 0) for leaf in leaves):
    warnings.warn(
      '`compensated` does nothing: got `params` without a bfloat16 or float16 '
      f'leaf, only {sorted({str(leaf.dtype) for leaf in leaves})}. Cast them, '
      'or leave out `compensated`.',
      stacklevel=3,
    )
