# SPDX-License-Identifier: Apache-2.0
"""The moving average of gradients, in float32 whatever the parameters are."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _trees


class ScaleByEmaState(NamedTuple):
  """The average, and how many gradients it is of."""

  count: chex.Array  # (), int32
  mu: optax.Updates  # like the parameters, float32


def scale_by_ema(
  b1: chex.Numeric, bias_correction: bool
) -> optax.GradientTransformationExtraArgs:
  """``optax.ema``, but for the name of its field and its dtype.

  Args:
    b1: decay of the average.
    bias_correction: whether to divide it by 1 - b1^t.

  Returns:
    A transformation.
  """

  def init_fn(params):
    mu = jax.tree.map(_trees.zeros, params)
    return ScaleByEmaState(jnp.zeros((), jnp.int32), mu)

  def update_fn(updates, state, params=None):
    del params
    count = _trees.increment(state.count)
    share = unbiased(b1, count, bias_correction)

    def leaf(g, mu):
      mu = b1 * mu + (1 - b1) * g
      return share * mu, mu

    updates, mu = _trees.map_leaves(leaf, updates, [state.mu])
    return updates, ScaleByEmaState(count, mu)

  return _trees.in_float32(optax.GradientTransformation(init_fn, update_fn))


def unbiased(
  b: chex.Numeric, count: chex.Array, bias_correction: bool = True
) -> chex.Array:
  """What corrects the bias of an average of so many: 1 / (1 - b^t), or 1."""
  if not bias_correction:
    return jnp.ones(())
  return 1 / _adam.weight(count, b)
