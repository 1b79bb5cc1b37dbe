# SPDX-License-Identifier: Apache-2.0
"""Equinox: a perceptron on digits, trained by the loop of its documentation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from clients import data
import optax_mp

RATE, STEPS = 3e-3, 60


def loss_fn(model, x, y):
  logits = jax.vmap(model)(x).astype(jnp.float32)
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(make, dtype, seed=0):
  """Losses of all steps, with what `make` makes of a rate; parameters."""
  optimizer = make(RATE)
  key = jax.random.key(seed)
  model = eqx.nn.MLP(64, 10, 256, 1, use_final_bias=False, key=key)
  params, static = eqx.partition(model, eqx.is_inexact_array)
  if dtype == jnp.bfloat16:
    params = optax_mp.cast(params)
  model = eqx.combine(params, static)
  state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

  @eqx.filter_jit
  def make_step(model, state, x, y):
    loss, gradients = eqx.filter_value_and_grad(loss_fn)(model, x, y)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    updates, state = optimizer.update(gradients, state, params)
    model = eqx.combine(optax.apply_updates(params, updates), static)
    return model, state, loss

  losses = []
  for x, y in data.images(STEPS, seed):
    model, state, loss = make_step(model, state, x, y)
    losses.append(loss)
  return losses, eqx.filter(model, eqx.is_inexact_array)
