# SPDX-License-Identifier: Apache-2.0
"""Keeps hyperparameters in the state, to read, change or schedule them."""

from collections.abc import Callable, Iterable
import functools
import inspect
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_mp._core import _hyperparams


class InjectedState(NamedTuple):
  """Hyperparameters, and the state of the optimizer that uses them.

  The counter is called ``step``, since the inner state has its own ``count``:
  ``optax.tree_utils.tree_get`` finds a rate, a count or a moment only once.
  """

  hyperparams: dict[str, chex.Array]  # float32 scalars, by name
  hyperparams_states: dict[str, Any]  # of schedules that have a state
  step: chex.Array  # (), int32: updates so far, for all other schedules
  inner_state: optax.OptState


def inject_hyperparams(
  factory: Callable[..., optax.GradientTransformation],
  static_args: str | Iterable[str] = (),
) -> Callable[..., optax.GradientTransformationExtraArgs]:
  """Keeps hyperparameters in the state, in float32.

  Take it to log the learning rate, to change it in mid-run, or to schedule any
  numeric hyperparameter. It works like ``optax.inject_hyperparams``, but knows
  which arguments of a recipe must be static, and does not round the others to
  the dtype of the parameters.

  Args:
    factory: a recipe or an optimizer of this library, or any function that
      makes a transformation. Its arguments that are numbers or schedules become
      hyperparameters.
    static_args: names of further arguments that stay as they are, beside
      ``factory.static_args``. Name functions that are not schedules here.

  Returns:
    A function of the same arguments, which takes a schedule for any number that
    is not static. It makes a transformation whose state has a dict
    ``hyperparams``.

  Raises:
    ValueError: if ``factory`` has no argument of a name in ``static_args``, or
      if a static number is given as a schedule.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_mp
    >>> make = optax_mp.inject_hyperparams(optax_mp.adamw_8bit)
    >>> tx = make(optax.linear_schedule(0.0, 1e-3, 10), weight_decay=0.1)
    >>> params = {'w': jnp.ones((64, 128), jnp.bfloat16)}
    >>> state = tx.init(params)
    >>> for _ in range(6):
    ...   updates, state = tx.update(params, state, params)
    >>> print(f"{state.hyperparams['learning_rate']:.1e}")
    5.0e-04
    >>> state.hyperparams['weight_decay'] = 0.2  # from the next step on
    >>> updates, state = tx.update(params, state, params)
    >>> print(state.hyperparams['weight_decay'])
    0.2

  **Caveats:** a hyperparameter with a schedule cannot be set by hand: the next
  update overwrites it. A decay by which a recipe chooses a format (``b1`` of
  ``adamw_8bit``) is static. No other wrapper should be around this one, since
  it would hide ``hyperparams`` from clients that look for the attribute.
  """
  parameters = inspect.signature(factory).parameters
  static_args = [static_args] if isinstance(static_args, str) else static_args
  static = {*static_args, *getattr(factory, 'static_args', ())}
  if unknown := sorted(static - set(parameters)):
    raise ValueError(
      f'`static_args` must be arguments of `factory`; got {unknown}, but it '
      f'has {list(parameters)}.'
    )

  @functools.wraps(factory, updated=())
  def make(*args, **kwargs):
    # A plain signature: `bind` of our own ones turns numbers into arrays.
    bound = inspect.Signature(list(parameters.values())).bind(*args, **kwargs)
    bound.apply_defaults()
    _check_static(parameters, static, bound.arguments)
    return _injected(factory, _sorted(bound, static))

  return make


class _Kinds(NamedTuple):
  """The arguments of a factory, sorted by their treatment."""

  args: tuple[Any, ...]  # the values of `*args`
  others: dict[str, Any]
  numbers: dict[str, Any]
  schedules: dict[str, Any]
  stateful: dict[str, Any]


def _injected(
  factory: Callable[..., Any], given: _Kinds
) -> optax.GradientTransformationExtraArgs:

  def transformation(numbers):
    tx = factory(*given.args, **given.others, **numbers)
    return optax.with_extra_args_support(tx)

  def scheduled(step, states, **extra_args):
    values = {name: f(step) for name, f in given.schedules.items()}
    for name, f in given.stateful.items():
      values[name] = f(states[name], **extra_args)
    return _arrays(values)

  def init_fn(params):
    step = jnp.zeros((), jnp.int32)
    states = {name: f.init() for name, f in given.stateful.items()}
    numbers = _arrays(given.numbers) | scheduled(step, states)
    inner_state = transformation(numbers).init(params)
    return InjectedState(numbers, states, step, inner_state)

  def update_fn(updates, state, params=None, **extra_args):
    now = scheduled(state.step, state.hyperparams_states, **extra_args)
    numbers = _arrays(state.hyperparams) | now
    updates, inner_state = transformation(numbers).update(
      updates, state.inner_state, params, **extra_args
    )
    states = {
      name: f.update(state.hyperparams_states[name], **extra_args)
      for name, f in given.stateful.items()
    }
    step = jnp.asarray(optax.safe_increment(state.step))
    return updates, InjectedState(numbers, states, step, inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _sorted(bound: inspect.BoundArguments, static: set[str]) -> _Kinds:
  args: tuple[Any, ...] = ()
  kinds: dict[str, dict[str, Any]] = {
    name: {} for name in _Kinds._fields if name != 'args'
  }
  for name, value in bound.arguments.items():
    kind = bound.signature.parameters[name].kind
    if kind is inspect.Parameter.VAR_POSITIONAL:
      args = value
    elif kind is inspect.Parameter.VAR_KEYWORD:
      for key, each in value.items():
        kinds[_kind(key, each, static)][key] = each
    else:
      kinds[_kind(name, value, static)][name] = value
  return _Kinds(args, **kinds)


def _kind(name: str, value: Any, static: set[str]) -> str:
  if name in static or isinstance(value, bool):
    return 'others'
  if _hyperparams.is_stateful(value):
    return 'stateful'
  if callable(value):
    return 'schedules'
  numeric = isinstance(value, (int, float, jax.Array, np.ndarray, np.number))
  return 'numbers' if numeric else 'others'


def _check_static(parameters: Any, static: set[str], values: Any) -> None:
  for name in static:
    is_number = isinstance(parameters[name].default, (int, float))
    if is_number and callable(values.get(name)):
      raise ValueError(
        f'`{name}` must be a number, since it decides what the program is; got '
        f'the schedule {values[name]!r}. Only other hyperparameters can be '
        'scheduled.'
      )


def _arrays(numbers: dict[str, Any]) -> dict[str, Any]:
  """The numbers as arrays: floats in float32, integers in their own dtype."""

  def array(x):
    dtype = jnp.asarray(x).dtype
    is_float = jnp.issubdtype(dtype, jnp.floating)
    return jnp.asarray(x, jnp.float32 if is_float else dtype)

  return {name: array(x) for name, x in numbers.items()}
