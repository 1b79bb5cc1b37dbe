# SPDX-License-Identifier: Apache-2.0
"""Skips steps that would make anything infinite or NaN."""

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
  last_finite: chex.Array  # (), bool: whether the last step was finite
  total_notfinite: chex.Array  # (), int32: all steps that were not finite
  inner_state: optax.OptState


def skip_nonfinite(
  tx: optax.GradientTransformation, max_consecutive: int | None = None
) -> optax.GradientTransformationExtraArgs:
  """Skips steps that would make anything infinite or NaN.

  Take it around a recipe if gradients may overflow: in float16, without
  clipping, or with data that nobody has cleaned. It replaces
  ``optax.apply_if_finite``, which checks gradients alone and needs updates of
  the same dtype. A bfloat16 gradient of 1e20 is finite, but its square is not.

  A step is skipped if a gradient is infinite or NaN, or if a finite value of
  the parameters or of the state becomes infinite or NaN. States of
  :func:`compressed` are checked in float32, before a format stores them. A
  skipped step changes no bit of the parameters and of the inner state: its
  updates are -0.0, and only the counts and the flag below change.

  **Stored:** two counts and a flag: ``notfinite_count`` (steps in a row),
  ``total_notfinite`` (all steps) and ``last_finite``.

  Args:
    tx: any Optax transformation: a recipe, a whole chain or a part of one.
    max_consecutive: how many steps in a row may be skipped. After them steps
      are taken even if they are not finite. None sets no limit.

  Returns:
    A transformation. Its updates and its inner state have the same dtypes as
    without the wrapper.

  Raises:
    ValueError: if ``max_consecutive`` is not an integer of 0 or more; in
      ``update``, if the state is not the one that ``init`` returned.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_mp
    >>> tx = optax_mp.skip_nonfinite(optax_mp.adamw_8bit(1e-3))
    >>> params = jnp.ones((64, 128), jnp.bfloat16)
    >>> state = tx.init(params)
    >>> gradients = params.at[3, 5].set(1e20)  # its square is infinite
    >>> updates, state = tx.update(gradients, state, params)
    >>> print(jnp.max(jnp.abs(updates)), state.total_notfinite)
    0.0 1

  **Caveats:** ``tx.update`` is called twice, the first time only to check the
  step. So memory holds one state, updated in place. The price is arithmetic and
  a second read of gradients, parameters and state. A callback inside ``tx``
  runs twice. If ``tx`` calls :func:`compressed` inside a ``jit`` or a ``cond``,
  the new state is checked as it is decoded. In a ``vmap`` of ``tx.update`` only
  the stored arrays are checked, whose codes hide infinities. One overflow skips
  the step of all parameters. To skip only the step of one group, wrap the
  transformation of this group in ``optax.partition``. In
  ``backward.fused_step`` use ``skip_nonfinite=True``.

  Around ``optax.MultiSteps``, its sum leaves out gradients that are not finite.
  A finite gradient whose square overflows may stay in the sum, and then every
  later step is skipped: clip gradients before they are added.
  """
  tx = _checked(tx, max_consecutive)

  def init_fn(params):
    zero = jnp.zeros((), jnp.int32)
    finite = jnp.ones((), jnp.bool)
    return SkipNonfiniteState(zero, finite, zero, tx.init(params))

  def update_fn(updates, state, params=None, **extra_args):
    _common.check_state(state, SkipNonfiniteState)
    consecutive, _, total, old = state
    # Only a flag remains of this first step. If a compiler knew that the second
    # one is the same, it would keep all results of the first until then.
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
  """The update, or -0.0: the number that changes no float it is added to."""
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
