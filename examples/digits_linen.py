# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits with Flax Linen and a `TrainState`, in bfloat16.

  python examples/digits_linen.py

An ordinary Linen loop: what changes is that the weights are cast to bfloat16
once, before `TrainState.create`, and that `tx` is `optax_mp.adamw_bf16`.
"""

from flax import linen as nn
from flax.training.train_state import TrainState
import jax
import jax.numpy as jnp
import optax

import digits
import optax_mp

EPOCHS, BATCH, SEED = 20, 64, 0
STEPS = EPOCHS * (1437 // BATCH)


class CNN(nn.Module):
  """Two convolutions and two dense layers for images of 8 x 8."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (batch, 8, 8, 1) to logits (batch, 10)."""
    x = nn.relu(nn.Conv(32, (3, 3))(x))
    x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x))
    x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
    return nn.Dense(10)(x)


def create_state(steps: int) -> TrainState:
  """Makes a model with bfloat16 weights and its optimizer."""
  model = CNN()
  params = model.init(jax.random.key(SEED), jnp.zeros((1, 8, 8, 1)))['params']
  params = optax_mp.cast(params)
  tx = optax_mp.adamw_bf16(
    optax.cosine_decay_schedule(2e-3, steps), weight_decay=0.01
  )
  return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


@jax.jit
def train_step(state: TrainState, images, labels):
  """Takes one step; float32 images make the layers compute in float32."""

  def loss_fn(params):
    logits = state.apply_fn({'params': params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()

  loss, gradients = jax.value_and_grad(loss_fn)(state.params)
  return state.apply_gradients(grads=gradients), loss


@jax.jit
def accuracy(state: TrainState, images, labels) -> jax.Array:
  """Returns the share of images whose largest logit is the label's."""
  logits = state.apply_fn({'params': state.params}, images)
  return (logits.argmax(-1) == labels).mean()


def main() -> float:
  """Trains, prints what happens and returns the test accuracy."""
  data = digits.load(8, 8, 1)
  state = create_state(STEPS)
  print(optax_mp.memory.plan(state.tx, state.params))

  reached = 0.0
  for epoch in range(1, EPOCHS + 1):
    for images, labels in digits.batches(data, BATCH, seed=epoch):
      state, loss = train_step(state, images, labels)
    if epoch % 5 == 0:
      reached = float(accuracy(state, data.test_images, data.test_labels))
      print(f'epoch {epoch}: loss {loss:.4f}, test accuracy {reached:.4f}')
  return reached


if __name__ == '__main__':
  main()
