# SPDX-License-Identifier: Apache-2.0
"""Training in float16 with a dynamic loss scale, for GPUs such as Colab's T4.

  python examples/float16_loss_scale.py

Float16 is for GPUs without bfloat16 units: the T4 of Colab, the V100 and the
RTX 20 series. There, XLA multiplies bfloat16 matrices in float32, which a T4
does at an eighth of the speed (8 against 65 TFLOP/s). On newer GPUs and on TPUs
take bfloat16, which needs none of this.

Float16 has no number above 65504 and none between 0 and 6e-8, where many
gradients lie. Flax's `DynamicScale` multiplies the loss by a factor and divides
the gradients by it. Where they overflow, the step is skipped and the factor is
halved; after 50 good steps it is doubled. The program begins with a factor that
is too large, and its output tells how many steps were skipped.
"""

import functools
import itertools
from typing import NamedTuple

import chex
from flax.training.dynamic_scale import DynamicScale
import jax
import jax.numpy as jnp
import optax

import digits
import optax_mp

EPOCHS, BATCH, SEED = 10, 64, 0
STEPS = EPOCHS * (1437 // BATCH)
WIDTHS = (64, 256, 256, 10)

tx = optax_mp.adamw_8bit(
  optax.cosine_decay_schedule(3e-3, STEPS), weight_decay=0.01
)


class State(NamedTuple):
  """What a step replaces."""

  params: chex.ArrayTree
  opt_state: optax.OptState
  scale: DynamicScale
  skipped: jax.Array  # steps so far


def create(seed: int = SEED) -> State:
  """Draws a perceptron in float16."""
  init = jax.nn.initializers.he_normal()
  shapes = list(itertools.pairwise(WIDTHS))
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  params = [
    {
      'kernel': init(key, shape, jnp.float16),
      'bias': jnp.zeros(shape[1:], jnp.float16),
    }
    for key, shape in zip(keys, shapes, strict=True)
  ]
  # Arrays from the first step on, so that a step is compiled once.
  start = {'fin_steps': jnp.int32(0), 'scale': jnp.float32(2.0**24)}
  scale = DynamicScale(growth_interval=50).replace(**start)
  return State(params, tx.init(params), scale, jnp.int32(0))


def network(params, images) -> jax.Array:
  """Computes in float16; the logits are float32, as the loss should be."""
  x = images.astype(jnp.float16)
  *hidden, last = params
  for layer in hidden:
    x = jax.nn.relu(x @ layer['kernel'] + layer['bias'])
  return (x @ last['kernel'] + last['bias']).astype(jnp.float32)


def loss_fn(params, images, labels) -> jax.Array:
  """Cross-entropy of a batch."""
  logits = network(params, images)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: State, images, labels) -> tuple[State, jax.Array]:
  """Takes one step, or leaves parameters and optimizer as they are."""
  grad_fn = state.scale.value_and_grad(loss_fn)
  scale, finite, loss, gradients = grad_fn(state.params, images, labels)
  updates, opt_state = tx.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  # Both are there, and one is chosen: GPUs are slow at branches. The whole
  # optimizer state goes back, too: its step count and moments are of steps
  # that were taken.
  params, opt_state = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old),
    (params, opt_state),
    (state.params, state.opt_state),
  )
  return State(params, opt_state, scale, state.skipped + ~finite), loss


def main() -> float:
  """Trains, prints what happens and returns the test accuracy."""
  data = digits.load(64)
  state = create()
  print(optax_mp.memory.plan(tx, state.params, gradients=jnp.float16))

  accuracy = 0.0
  for epoch in range(1, EPOCHS + 1):
    for images, labels in digits.batches(data, BATCH, seed=epoch):
      state, loss = train_step(state, images, labels)
    if epoch == 1 or epoch % 5 == 0:
      logits = network(state.params, data.test_images)
      accuracy = float((logits.argmax(-1) == data.test_labels).mean())
      print(
        f'epoch {epoch}: loss {loss:.4f}, test accuracy {accuracy:.4f}, '
        f'scale 2**{jnp.log2(state.scale.scale):.0f}, {state.skipped} skipped'
      )
  return accuracy


if __name__ == '__main__':
  main()
