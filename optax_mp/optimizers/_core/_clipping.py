# SPDX-License-Identifier: Apache-2.0
"""What LOMO and AdaLomo do to gradients before anything else."""

import chex
import jax
import jax.numpy as jnp
import optax

from optax_mp.optimizers._core import _checks


def prepared(
  clip_value: chex.Numeric | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Divides by the scale of the loss, clips values, then scales for a norm.

  .. math::
    g \leftarrow k \cdot \min(\max(g / s, -v), v)

  ``update`` takes ``loss_scale=``, s, and ``clip_coef=``, k. They are known
  outside alone: the norm that k stands for is of all gradients as they were
  before, and a state that kept it would be a step behind.

  Args:
    clip_value: v.

  Returns:
    A transformation without state.

  Raises:
    ValueError: for a ``clip_value`` of 0 or less.
  """
  _checks.positive(clip_value=clip_value)

  def init_fn(params):
    del params
    return optax.EmptyState()

  def update_fn(
    updates, state, params=None, *, loss_scale=None, clip_coef=None, **extra
  ):
    del params, extra

    def leaf(g):
      g = g if loss_scale is None else g / loss_scale
      if clip_value is not None:
        g = jnp.clip(g, jnp.negative(clip_value), clip_value)
      return g if clip_coef is None else g * clip_coef

    return jax.tree.map(leaf, updates), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
