# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits with Haiku, in bfloat16 with moments of 8 bits.

  pip install dm-haiku
  python examples/haiku_mlp.py

An ordinary Haiku loop: what changes is that the parameters are cast to bfloat16
once, after `network.init`, and that the optimizer is `optax_mp.adamw_8bit`.
"""

import functools

import haiku as hk
import jax
import optax

import digits
import optax_mp

EPOCHS, BATCH, SEED = 10, 64, 0
STEPS = EPOCHS * (1437 // BATCH)

network = hk.without_apply_rng(
  hk.transform(lambda images: hk.nets.MLP([256, 256, 10])(images))
)
tx = optax_mp.adamw_8bit(
  optax.cosine_decay_schedule(3e-3, STEPS), weight_decay=0.01
)


def loss_fn(params, images, labels) -> jax.Array:
  """Float32 images make the layers compute in float32."""
  logits = network.apply(params, images)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, opt_state, images, labels):
  """Takes one step; donated, old parameters make room for the new ones."""
  loss, gradients = jax.value_and_grad(loss_fn)(params, images, labels)
  updates, opt_state = tx.update(gradients, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


def main() -> float:
  """Trains, prints what happens and returns the test accuracy."""
  data = digits.load(64)
  params = network.init(jax.random.key(SEED), data.images[:1])
  params = optax_mp.cast(params)
  opt_state = tx.init(params)
  print(optax_mp.memory.plan(tx, params))

  accuracy = 0.0
  for epoch in range(1, EPOCHS + 1):
    for images, labels in digits.batches(data, BATCH, seed=epoch):
      params, opt_state, loss = train_step(params, opt_state, images, labels)
    if epoch % 5 == 0:
      logits = network.apply(params, data.test_images)
      accuracy = float((logits.argmax(-1) == data.test_labels).mean())
      print(f'epoch {epoch}: loss {loss:.4f}, test accuracy {accuracy:.4f}')
  return accuracy


if __name__ == '__main__':
  main()
