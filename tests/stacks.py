# SPDX-License-Identifier: Apache-2.0
"""A small stack of layers, and the step that everybody writes for it."""

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

LAYERS, WIDTH, WORDS = 3, 8, 5


class Model(NamedTuple):
  """Parameters and a batch."""

  rest: Any
  stack: Any
  batch: tuple[Any, ...]


def model(dtype=jnp.float32, layers=LAYERS, width=WIDTH, seed=0) -> Model:
  """Words in, words out."""
  keys = iter(jax.random.split(jax.random.key(seed), 4))

  def normal(*shape):
    return (0.3 * jax.random.normal(next(keys), shape)).astype(dtype)

  rest = {'in': normal(WORDS, width), 'out': normal(width, WORDS)}
  stack = {
    'kernel': normal(layers, width, width),
    'bias': jnp.zeros((layers, width), dtype),
  }
  x = jax.random.randint(next(keys), (16,), 0, WORDS)
  return Model(rest, stack, (x, (2 * x + 1) % WORDS))


def block_fn(p, h):
  return h + jnp.tanh(h @ p['kernel'] + p['bias'][None])


def loss_fn(rest, blocks, x, y):
  logits = (blocks(rest['in'][x]) @ rest['out']).astype(jnp.float32)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
  return losses.mean()


def plain_loss(params, *batch):
  """The same by `scan` and `jax.checkpoint`."""
  rest, stack = params

  @jax.checkpoint
  def layer(h, p):
    return block_fn(p, h), None

  return loss_fn(rest, lambda h: lax.scan(layer, h, stack)[0], *batch)


def ordinary(tx):
  """`step((rest, stack), state, *batch)`: gradients, then the update."""

  def step(params, state, *batch):
    loss, gradients = jax.value_and_grad(plain_loss)(params, *batch)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss

  return step


def by_layer(tx):
  """As `ordinary`, but `tx` sees one layer at a time, and which one it is."""
  tx = optax.with_extra_args_support(tx)

  def update(gradients, state, params, layer=None):
    extra = {} if layer is None else {'layer': layer}
    updates, state = tx.update(gradients, state, params, **extra)
    return optax.apply_updates(params, updates), state

  def step(params, state, *batch):
    loss, gradients = jax.value_and_grad(plain_loss)(params, *batch)
    rest, rest_state = update(gradients[0], state[0], params[0])
    layers = jnp.arange(len(jax.tree.leaves(params[1])[0])).astype(jnp.uint32)
    stack, stack_state = jax.vmap(update)(
      gradients[1], state[1], params[1], layers
    )
    return (rest, stack), (rest_state, stack_state), loss

  def init(params):
    return tx.init(params[0]), jax.vmap(tx.init)(params[1])

  return init, step
