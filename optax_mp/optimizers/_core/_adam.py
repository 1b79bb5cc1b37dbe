# SPDX-License-Identifier: Apache-2.0
"""Adam on whatever is left of a gradient, and its two kinds of weight decay."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_mp.optimizers._core import _trees

Mask = Any | Callable[[optax.Params], Any] | None


class ScaleByAdamState(NamedTuple):
  """Adam's moments, in float32 whatever the parameters are."""

  count: chex.Array  # (), int32
  mu: optax.Updates  # like the parameters, float32
  nu: optax.Updates  # like the parameters, float32


def adam_form(
  x: chex.Array,
  mu: chex.Array,
  nu: chex.Array,
  step: chex.Array,
  b1: chex.Numeric,
  b2: chex.Numeric,
  eps: chex.Numeric,
) -> tuple[chex.Array, chex.Array, chex.Array]:
  r"""Adam as GaLore, Fira, APOLLO and Subset-Norm write it.

  .. math::
    M \leftarrow b_1 M + (1 - b_1) x, \quad V \leftarrow b_2 V + (1 - b_2) x^2,
    \quad D = \frac{\sqrt{1 - b_2^t}}{1 - b_1^t} \frac{M}{\sqrt V + \epsilon}

  Unlike Optax's, eps is added before the bias is corrected.

  Args:
    x: the gradient, or what was projected of it.
    mu: M, of the same shape.
    nu: V.
    step: t, 1 at the first update.
    b1: decay of M.
    b2: decay of V.
    eps: added to the root.

  Returns:
    D, M, V.
  """
  n, mu, nu = normalized(x, mu, nu, b1, b2, eps)
  return bias(step, b1, b2) * n, mu, nu


def normalized(
  x: chex.Array,
  mu: chex.Array,
  nu: chex.Array,
  b1: chex.Numeric,
  b2: chex.Numeric,
  eps: chex.Numeric,
) -> tuple[chex.Array, chex.Array, chex.Array]:
  """The quotient M / (sqrt(V) + eps) of :func:`adam_form`; it, M, V."""
  mu = b1 * mu + (1 - b1) * x
  nu = b2 * nu + (1 - b2) * jnp.square(x)
  return mu / (jnp.sqrt(nu) + eps), mu, nu


def bias(step: chex.Array, b1: chex.Numeric, b2: chex.Numeric) -> chex.Array:
  """What corrects the bias of both moments: sqrt(1 - b2^t) / (1 - b1^t)."""
  return jnp.sqrt(weight(step, b2)) / weight(step, b1)


def weight(step: chex.Array, b: chex.Numeric) -> chex.Array:
  """The sum of the weights of t values in an average, 1 - b^t.

  Not as the difference: of 1 - 0.999 float32 keeps five digits, beside values
  that were weighted with all of them.
  """
  if isinstance(b, int | float):
    log = math.log(b) if b > 0 else -math.inf
  else:
    log = jnp.log(b)
  return -jnp.expm1(step.astype(jnp.float32) * log)


def scale_by_adam(
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  eps: chex.Numeric = 1e-8,
  *,
  eps_first: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Optax's Adam, moments in float32 whatever the parameters are.

  Args:
    b1: decay of the first moment.
    b2: decay of the second.
    eps: added to the root of the second.
    eps_first: before the bias is corrected, as in :func:`adam_form`.

  Returns:
    A transformation.
  """

  def init_fn(params):
    mu, nu = (jax.tree.map(_trees.zeros, params) for _ in range(2))
    return ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

  def update_fn(updates, state, params=None):
    del params
    count = _trees.increment(state.count)
    # D = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) is the other form with
    # eps multiplied by sqrt(1 - b2^t).
    own = eps if eps_first else eps * jnp.sqrt(weight(count, b2))

    def leaf(g, mu, nu):
      return adam_form(g, mu, nu, count, b1, b2, own)

    updates, mu, nu = _trees.map_leaves(leaf, updates, (state.mu, state.nu))
    return updates, ScaleByAdamState(count, mu, nu)

  return _trees.in_float32(optax.GradientTransformation(init_fn, update_fn))


class DecayState(NamedTuple):
  """How often a schedule was asked."""

  count: chex.Array  # (), int32


def decay_after_step(
  learning_rate: optax.ScalarOrSchedule, weight_decay: Any, mask: Mask
) -> optax.GradientTransformation:
  r"""The learning rate, then weight decay of what the weights have become.

  .. math::
    A = \eta D, \quad u = -A - \eta \lambda (W - A)

  as in the official codes of GaLore, Fira, APOLLO and Subset-Norm, where
  AdamW's is the decay of the weights before the step.

  Args:
    learning_rate: eta, a number or a schedule.
    weight_decay: lambda.
    mask: what to decay, see ``optax.adamw``.

  Returns:
    A transformation of D.
  """
  step = optax.scale_by_learning_rate(learning_rate)
  if _is_zero(weight_decay):
    return step

  def init_fn(params):
    del params
    return DecayState(jnp.zeros((), jnp.int32))

  def update_fn(updates, state, params=None):
    _trees.check_params(params)
    rate = learning_rate
    if callable(learning_rate):
      rate = learning_rate(state.count)
    updates = jax.tree.map(
      lambda d, w: d + weight_decay * (w - rate * d), updates, params
    )
    return updates, DecayState(_trees.increment(state.count))

  tx = optax.GradientTransformation(init_fn, update_fn)
  if mask is not None:
    tx = optax.masked(tx, mask)
  return optax.chain(tx, step)


def decay_before_step(
  learning_rate: optax.ScalarOrSchedule, weight_decay: Any, mask: Mask
) -> optax.GradientTransformation:
  """AdamW's weight decay, then the learning rate.

  Args:
    learning_rate: a number or a schedule.
    weight_decay: as in ``optax.adamw``.
    mask: what to decay.

  Returns:
    A transformation of scaled gradients.
  """
  step = optax.scale_by_learning_rate(learning_rate)
  if _is_zero(weight_decay):
    return step
  return optax.chain(optax.add_decayed_weights(weight_decay, mask), step)


def _is_zero(weight_decay: Any) -> bool:
  """A number that is 0; one that is traced is not known."""
  return isinstance(weight_decay, int | float) and weight_decay == 0
