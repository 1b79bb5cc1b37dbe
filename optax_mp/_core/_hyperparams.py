# SPDX-License-Identifier: Apache-2.0
"""Keeps hyperparameters in 32 bits, and refuses those that were rounded.

``optax.inject_hyperparams`` turns numbers into arrays, in the dtype of the
parameters unless told otherwise. In bfloat16 a decay of 0.999 is 1. The second
moment then stays zero, and the optimizer divides by zero.
"""

from collections.abc import Callable, Iterable
import functools
import inspect
from typing import Any, ParamSpec, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from optax_mp._core import _boxes

_P = ParamSpec('_P')
_R_co = TypeVar('_R_co', covariant=True)

# Arguments with these names are static in every function: they are shapes,
# branches, dtypes, or functions, which Optax would take for schedules.
STATIC = frozenset({
  'accumulator_dtype',
  'axis',
  'block_size',
  'blocks',
  'density',
  'gap',
  'keep_float32',
  'mask',
  'matrices',
  'min_dim_size_to_factor',
  'min_size',
  'mu_dtype',
  'muon_weight_dimension_numbers',
  'ns_steps',
  'projector',
  'rank',
  'residual_bits',
  'rewarm_steps',
  'seed',
  'square_axis',
  'subset_size',
  'weight_decay_mask',
  'window',
})  # fmt: skip


class Factory(Protocol[_P, _R_co]):
  """A function of hyperparameters that makes a transformation."""

  # Names of arguments that `optax.inject_hyperparams` must leave alone.
  static_args: tuple[str, ...]

  def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R_co:
    """The transformation."""
    ...


def factory(
  *static: str, decays: tuple[str, ...] = ()
) -> Callable[[Callable[_P, _R_co]], Factory[_P, _R_co]]:
  """Refuses rounded hyperparameters, and lists the static ones by name.

  Args:
    *static: names of arguments of this function that are static, beside the
      names in ``STATIC``.
    decays: names of numbers by which the function chooses a format. They are
      static even if ``optax.inject_hyperparams`` is not told so.

  Returns:
    A decorator.
  """

  def decorate(function: Callable[_P, _R_co]) -> Factory[_P, _R_co]:
    parameters = inspect.signature(function).parameters
    names = list(parameters)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
      for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        check_32_bits(name, value)
      # Masks may be boxed like the parameters; optimizers see no boxes.
      if _boxes.has_boxes(args, kwargs):
        args, kwargs = _boxes.unbox((args, kwargs))
      return function(*args, **kwargs)

    known = STATIC.union(static, decays)
    static_args = tuple(name for name in names if name in known)
    signature = _Signature(list(parameters.values()))
    signature.static, signature.decays = frozenset(static_args), decays
    setattr(checked, 'static_args', static_args)  # noqa: B010, for pyright
    setattr(checked, '__signature__', signature)  # noqa: B010
    return checked  # type: ignore[return-value]

  return decorate


def check_32_bits(name: str, value: Any) -> None:
  """Raises a ValueError for a hyperparameter that has been rounded."""
  if isinstance(value, (jax.Array, np.ndarray, np.generic)):
    dtype = jnp.dtype(value.dtype) if value.ndim == 0 else None
    if dtype and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
      raise ValueError(
        f'`{name}` must have 32 bits; got {dtype}, which rounds it: in '
        'bfloat16, 0.999 is 1. `optax.inject_hyperparams` casts '
        'hyperparameters to the dtype of the parameters: pass it '
        '`hyperparam_dtype=jnp.float32`, or take '
        '`optax_mp.inject_hyperparams`.'
      )


class _Signature(inspect.Signature):
  """A signature that binds numbers in float32, for ``inject_hyperparams``.

  Optax binds its caller's arguments to the signature, and then casts numbers,
  but not arrays that have a dtype of their own.
  """

  static: frozenset[str] = STATIC
  decays: Iterable[str] = ()

  def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
    """Binds as any signature does, with numbers and schedules in float32."""
    bound = super().bind(*args, **kwargs)
    bound.apply_defaults()
    for name, value in bound.arguments.items():
      if name in self.decays and isinstance(value, float):
        # Optax does not take this for a number, and leaves it alone.
        bound.arguments[name] = np.float32(value)
      elif name not in self.static:
        bound.arguments[name] = in_float32(value)
    return bound

  def replace(self, **changes: Any) -> '_Signature':  # type: ignore[override]
    """Replaces as any signature does; ``functools.partial`` calls it."""
    new = super().replace(**changes)
    new.static, new.decays = self.static, self.decays
    return new


def in_float32(value: Any) -> Any:
  """Makes a float32 array of a number, and of each value of a schedule.

  Args:
    value: a hyperparameter. JAX arrays with a dtype of their own stay as they
      are, and so do values that are neither numbers nor schedules.

  Returns:
    The new value, which Optax does not cast.
  """
  if is_stateful(value):
    return _Schedule(value)
  if callable(value):
    return lambda count: in_float32(value(count))
  dtype = getattr(value, 'dtype', type(value))
  if np.ndim(value) or not jnp.issubdtype(dtype, jnp.floating):
    return value
  if isinstance(value, jax.Array) and not value.weak_type:
    return value
  return jnp.asarray(value, jnp.float32)


def is_stateful(value: Any) -> bool:
  """Whether ``value`` is one of Optax's schedules with a state."""
  return callable(value) and hasattr(value, 'init') and hasattr(value, 'update')


class _Schedule:
  """A schedule with a state, in float32."""

  def __init__(self, schedule: Any):
    self.init, self.update = schedule.init, schedule.update
    self.schedule = schedule

  def __call__(self, state: Any, **extra_args: Any) -> Any:
    return in_float32(self.schedule(state, **extra_args))
