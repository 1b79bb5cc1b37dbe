# SPDX-License-Identifier: Apache-2.0
"""Haiku: a convolution with batch statistics, by the loop of its examples."""

from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from clients import data
import optax_mp

RATE, STEPS = 3e-3, 50


class TrainingState(NamedTuple):
  """As in Haiku's `examples/mnist.py`, with the statistics."""

  params: hk.Params
  statistics: hk.State
  opt_state: Any


def network(x):
  x = hk.Conv2D(16, 3, with_bias=False)(x.reshape(-1, 8, 8, 1))
  x = hk.BatchNorm(True, False, 0.9)(x, is_training=True)
  x = hk.AvgPool((2, 2, 1), (2, 2, 1), 'SAME')(jax.nn.relu(x))
  return hk.Linear(10, with_bias=False)(hk.Flatten()(x))


def train(make, dtype, seed=0):
  """Losses of all steps, with what `make` makes of a rate; parameters."""
  optimizer = make(RATE)
  net = hk.without_apply_rng(hk.transform_with_state(network))

  def loss_fn(params, statistics, x, y):
    logits, statistics = net.apply(params, statistics, x)
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, statistics

  @jax.jit
  def update(state, x, y):
    (loss, statistics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params, state.statistics, x, y
    )
    updates, opt_state = optimizer.update(
      gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    return TrainingState(params, statistics, opt_state), loss

  batches = list(data.images(STEPS, seed))
  params, statistics = net.init(jax.random.key(seed), batches[0][0])
  if dtype == jnp.bfloat16:
    params = optax_mp.cast(params)
  state = TrainingState(params, statistics, optimizer.init(params))
  losses = []
  for x, y in batches:
    state, loss = update(state, x.astype(dtype), y)
    losses.append(loss)
  return losses, state.params
