# SPDX-License-Identifier: Apache-2.0
"""Steps that would make something infinite or NaN are not taken."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_mp._core import _barriers
from optax_mp._core import _finite
from optax_mp.formats import _base
from optax_mp.wrappers import _common


class SkipNonfiniteState(NamedTuple):
  """Counts, named as in ``optax.ApplyIfFiniteState``, and the inner state."""

  notfinite_count: chex.Array  # (), int32: steps in a row that were not finite
  last_finite: chex.Array  # (), bool: whether the last one was
  total_notfinite: chex.Array  # (), int32
  inner_state: optax.OptState


def skip_nonfinite(
  tx: optax.GradientTransformation, max_consecutive: int | None = None
) -> optax.GradientTransformationExtraArgs:
  """Skips steps that would make anything infinite or NaN.

  Take it around a recipe where gradients may overflow: in float16, without
  clipping, with data that nobody has cleaned. It stands in place of
  ``optax.apply_if_finite``, which looks at gradients alone and asks for updates
  of their dtype. A bfloat16 gradient of 1e20 is finite, and its square is not.

  A step is skipped if a gradient is infinite or NaN, or if a parameter or a
  value of the state becomes so that was not before. States of
  :func:`compressed` are looked at in float32, before a format stores them. In a
  skipped step parameters and states stay what they are, bit for bit: updates
  are -0.0, and the counts below are all that changes.

  **Stored:** two counts and a flag, ``notfinite_count`` (of steps in a row),
  ``total_notfinite`` and ``last_finite``.

  Args:
    tx: any Optax transformation: a recipe, a whole chain or a part of one.
    max_consecutive: so many steps in a row are skipped at most, the next one is
      taken whatever it does; None: no step is.

  Returns:
    A transformation whose updates and inner state have the dtypes that those of
    ``tx`` have.

  Raises:
    ValueError: for a ``max_consecutive`` that is no integer of 0 or more; in
      ``update``, for a state that is not its own.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_mp
    >>> tx = optax_mp.skip_nonfinite(optax_mp.adamw_8bit(1e-3))
    >>> params = jnp.ones((64, 128), jnp.bfloat16)
    >>> state = tx.init(params)
    >>> gradients = params.at[3, 5].set(1e20)  # its square is infinite
    >>> updates, state = tx.update(gradients, state, params)
    >>> print(jnp.max(jnp.abs(updates)), state.total_notfinite)
    0.0 1

  **Caveats:** ``tx.update`` is called twice, first for what to look at. So no
  second state is kept: the state is updated where it lies. It costs arithmetic,
  and gradients, parameters and state are read once more. A callback inside it
  runs twice. The new state of a :func:`compressed` within another ``jit``,
  ``vmap`` or ``cond`` inside ``tx`` is seen as it is stored, where an infinity
  may have become a large number. One bad gradient skips the step of all
  parameters; to skip those of a group alone, put it around a part of
  ``optax.partition``. In ``backward.fused_step`` use ``skip_nonfinite=True``.
  """
  tx = _checked(tx, max_consecutive)

  def init_fn(params):
    zero = jnp.zeros((), jnp.int32)
    finite = jnp.ones((), jnp.bool)
    return SkipNonfiniteState(zero, finite, zero, tx.init(params))

  def update_fn(updates, state, params=None, **extra_args):
    _common.check_state(state, SkipNonfiniteState)
    consecutive, _, total, old = state
    # A step of its own, of which nothing but a flag is left: a compiler that
    # knew it to be the one that is taken would keep all of it until then.
    finite = _finite.step_is_finite(
      functools.partial(tx.update, **extra_args),
      updates,
      *_barriers.told_apart((old, params)),
    )
    consecutive = jnp.where(finite, 0, optax.safe_increment(consecutive))
    total = jnp.where(finite, total, optax.safe_increment(total))
    taken = finite
    if max_consecutive is not None:
      taken |= consecutive > max_consecutive
    with _finite.unnoticed():
      new_updates, new = tx.update(updates, old, params, **extra_args)
    new_updates = jax.tree.map(lambda u: _or_nothing(taken, u), new_updates)
    new = jax.tree.map(lambda x, y: _select(taken, x, y), new, old)
    return new_updates, SkipNonfiniteState(consecutive, finite, total, new)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _or_nothing(taken: jax.Array, update: Any) -> Any:
  """The update, or the number that leaves every float as it is, -0.0, too."""
  if not _is_number(update):
    return update
  nothing = jnp.zeros_like(update)
  if jnp.issubdtype(nothing.dtype, jnp.inexact):
    nothing = -nothing
  return jnp.where(taken, update, nothing)


def _select(taken: jax.Array, new: Any, old: Any) -> Any:
  if not isinstance(new, jax.Array):
    return new
  if jnp.issubdtype(new.dtype, jax.dtypes.extended):
    return jnp.where(taken, new, old)
  return jnp.where(taken, new, jnp.asarray(old, new.dtype))


def _is_number(x: Any) -> bool:
  dtype = getattr(x, 'dtype', type(x))
  return jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool)


def _checked(tx: Any, max_consecutive: Any):
  _base.check_static(max_consecutive, 'max_consecutive')
  if max_consecutive is not None:
    if not _base.is_integer(max_consecutive) or max_consecutive < 0:
      raise ValueError(
        '`max_consecutive` must be an integer, 0 or more, or None for no '
        f'limit; got {max_consecutive!r}.'
      )
  if not (hasattr(tx, 'init') and hasattr(tx, 'update')):
    raise ValueError(
      '`tx` must be an Optax transformation such as `optax_mp.adamw_8bit(1e-3)`'
      f'; got {tx!r}.'
    )
  return optax.with_extra_args_support(tx)
