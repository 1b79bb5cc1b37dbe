# SPDX-License-Identifier: Apache-2.0
"""A Linen model with `nn.scan`, its layers updated in the backward pass.

  python examples/backward_linen.py [--half float16]

Handwritten digits, read row by row by a stack of attention layers that
`nn.scan` has made: its parameters have a leading axis, and `fused_step` walks
them. With float16 the loss is scaled by Flax's `DynamicScale`, and a step whose
gradient is not finite is skipped.
"""

import argparse
from typing import Any

from flax import linen as nn
from flax.training import dynamic_scale
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_mp

LAYERS, WIDTH, EPOCHS, BATCH, SEED = 6, 64, 20, 64, 0


class Block(nn.Module):
  """Attention and a feed-forward layer, each added to what comes in."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, _=None) -> tuple[jax.Array, None]:
    """Maps (batch, 8, width) to the same; a pair, as `nn.scan` wants it."""
    normal = nn.LayerNorm(dtype=self.dtype)(x)
    x += nn.MultiHeadDotProductAttention(num_heads=4, dtype=self.dtype)(normal)
    wide = nn.Dense(2 * WIDTH, dtype=self.dtype)(
      nn.LayerNorm(dtype=self.dtype)(x)
    )
    return x + nn.Dense(WIDTH, dtype=self.dtype)(nn.gelu(wide)), None


class Model(nn.Module):
  """Rows of 8 pixels in, logits of ten digits out."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, images: jax.Array, run=None) -> jax.Array:
    """Maps (batch, 8, 8) to (batch, 10); `run` runs the blocks elsewhere."""
    x = nn.Dense(WIDTH, dtype=self.dtype)(images)
    x += self.param('rows', nn.initializers.normal(0.02), (8, WIDTH), x.dtype)
    stack = nn.scan(
      Block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=LAYERS,
    )
    x = run(x) if run else stack(self.dtype, name='blocks')(x, None)[0]
    return nn.Dense(10, dtype=jnp.float32)(x.mean(1))


def make_step(dtype: jnp.dtype, steps: int) -> optax_mp.backward.FusedStep:
  """The loss around the blocks, and one block."""

  def loss_fn(rest, blocks, images, labels):
    logits: Any = Model(dtype).apply({'params': rest}, images, blocks)
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()

  def block_fn(params, x):
    return Block(dtype).apply({'params': params}, x)[0]

  tx = optax_mp.adamw_bf16(
    optax.cosine_decay_schedule(2e-3, steps), weight_decay=0.01, min_size=0
  )
  return optax_mp.backward.fused_step(
    loss_fn, block_fn, tx, max_norm=1.0, skip_nonfinite=dtype == jnp.float16
  )


def make_train(step: optax_mp.backward.FusedStep, half: str):
  """Compiles the step, with a scaled loss if it is float16 that computes."""

  def train(rest, stack, state, images, labels):
    return step(rest, stack, state, images, labels)

  def train_scaled(rest, stack, state, scale, images, labels):
    rest, stack, new, loss = step(
      rest, stack, state, images, labels, loss_scale=scale.scale
    )
    skipped = new.total_notfinite > state.total_notfinite
    # All that it must be told is whether a gradient was finite.
    finite = jnp.where(skipped, jnp.nan, 1.0)
    scale, *_ = scale.value_and_grad(lambda x: finite * x)(1.0)
    return rest, stack, new, scale, loss

  if half == 'bfloat16':
    return jax.jit(train, donate_argnums=(0, 1, 2))
  return jax.jit(train_scaled, donate_argnums=(0, 1, 2, 3))


def main(argv: list[str] | None = None) -> float:
  """Trains, prints what happens and returns the test accuracy."""
  parser = argparse.ArgumentParser(description=__doc__)
  choices = ('bfloat16', 'float16')
  parser.add_argument('--half', default='bfloat16', choices=choices)
  parser.add_argument('--epochs', type=int, default=EPOCHS)
  arguments = parser.parse_args(argv)
  half = arguments.half
  images, labels = load_digits(return_X_y=True)
  images = images.reshape(-1, 8, 8).astype(half) / 16
  images, test_images, labels, test_labels = train_test_split(
    images, labels, test_size=0.2, random_state=SEED, stratify=labels
  )
  batches = len(images) // BATCH
  model = Model(jnp.dtype(half))
  rest = jax.jit(model.init)(jax.random.key(SEED), images[:1])['params']
  rest: Any = optax.tree.cast(rest, jnp.dtype(half))
  stack = rest.pop('blocks')
  step = make_step(jnp.dtype(half), arguments.epochs * batches)
  carry = rest, stack, step.init(rest, stack)
  if half == 'float16':
    scale = dynamic_scale.DynamicScale(growth_interval=100)
    # Arrays from the first step on, so that `train` is compiled once.
    start = {'fin_steps': jnp.int32(0), 'scale': jnp.float32(65536.0)}
    carry += (scale.replace(**start),)
  train = make_train(step, half)

  @jax.jit
  def accuracy(rest, stack):
    whole = {'params': rest | {'blocks': stack}}
    logits: Any = model.apply(whole, test_images)
    return (logits.argmax(-1) == test_labels).mean()

  shuffle = np.random.default_rng(SEED)
  for epoch in range(1, arguments.epochs + 1):
    order = shuffle.permutation(len(images))[: batches * BATCH]
    for rows in order.reshape(batches, BATCH):
      *carry, loss = train(*carry, images[rows], labels[rows])
    if epoch % 5 == 0 or epoch == arguments.epochs:
      print(
        f'epoch {epoch}: loss {loss:.4f}, test accuracy '
        f'{accuracy(*carry[:2]):.4f}, {carry[2].total_notfinite} skipped'
      )
  return float(accuracy(*carry[:2]))


if __name__ == '__main__':
  main()
