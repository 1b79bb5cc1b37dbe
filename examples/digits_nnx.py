# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits with Flax NNX, in bfloat16 with moments of 8 bits.

  python examples/digits_nnx.py

An ordinary NNX loop: what changes is that the `nnx.Param`s are cast to bfloat16
once, before `nnx.Optimizer` is made, and that it holds `optax_mp.adamw_8bit`.
Casting afterwards draws the weights that a float32 run would have;
`param_dtype=jnp.bfloat16` draws others. Batch statistics stay float32.
"""

from flax import nnx
import jax
import optax

import digits
import optax_mp

EPOCHS, BATCH, SEED = 5, 64, 0
STEPS = EPOCHS * (1437 // BATCH)

tx = optax_mp.adamw_8bit(
  optax.cosine_decay_schedule(2e-3, STEPS), weight_decay=0.01
)


class CNN(nnx.Module):
  """Two convolutions and two dense layers for images of 8 x 8."""

  def __init__(self, rngs: nnx.Rngs):
    self.first = nnx.Conv(1, 32, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(32, rngs=rngs)
    self.second = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
    self.wide = nnx.Linear(4 * 4 * 64, 128, rngs=rngs)
    self.out = nnx.Linear(128, 10, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (batch, 8, 8, 1) to logits (batch, 10)."""
    x = nnx.relu(self.norm(self.first(x)))
    x = nnx.relu(self.second(x))
    return self.out(nnx.relu(self.wide(x.reshape(len(x), -1))))


def to_bfloat16(model: nnx.Module) -> None:
  """Casts the parameters in place, and nothing else."""
  nnx.update(model, optax_mp.cast(nnx.state(model, nnx.Param)))


def loss_fn(model: CNN, images, labels) -> jax.Array:
  """Float32 images make the layers compute in float32."""
  return optax.softmax_cross_entropy_with_integer_labels(
    model(images), labels
  ).mean()


@nnx.jit
def train_step(model: CNN, optimizer: nnx.Optimizer, images, labels):
  """Takes one step, in place, and returns the loss."""
  loss, gradients = nnx.value_and_grad(loss_fn)(model, images, labels)
  optimizer.update(model, gradients)
  return loss


@nnx.jit
def accuracy(model: CNN, images, labels) -> jax.Array:
  """Returns the share of images whose largest logit is the label's."""
  return (model(images).argmax(-1) == labels).mean()


def main() -> float:
  """Trains, prints what happens and returns the test accuracy."""
  data = digits.load(8, 8, 1)
  model = CNN(nnx.Rngs(SEED))
  to_bfloat16(model)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  print(optax_mp.memory.plan(tx, nnx.state(model, nnx.Param)))

  reached = 0.0
  for epoch in range(1, EPOCHS + 1):
    model.train()
    for images, labels in digits.batches(data, BATCH, seed=epoch):
      loss = train_step(model, optimizer, images, labels)
    model.eval()
    reached = float(accuracy(model, data.test_images, data.test_labels))
    print(f'epoch {epoch}: loss {loss:.4f}, test accuracy {reached:.4f}')
  return reached


if __name__ == '__main__':
  main()
