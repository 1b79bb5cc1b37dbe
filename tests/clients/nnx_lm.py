# SPDX-License-Identifier: Apache-2.0
"""Flax NNX: a language model, by the loop of its documentation; LoRA."""

import functools

from flax import nnx
import jax.numpy as jnp
import optax

from clients import data
import optax_mp

RATE, STEPS, WIDTH = 1e-2, 40, 128


class Model(nnx.Module):
  """The next word, from the mean of those before and the last one."""

  def __init__(self, rngs, rank=0):
    linear = nnx.Linear
    if rank:
      linear = functools.partial(nnx.LoRALinear, lora_rank=rank)
    self.embed = nnx.Embed(data.WORDS, WIDTH, rngs=rngs)
    self.hidden = linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
    self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

  def __call__(self, words):
    x = self.embed(words)
    counts = jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
    x = x + jnp.cumsum(x, 1) / counts
    return self.embed.attend(jnp.tanh(self.norm(self.hidden(x))))


def loss_fn(model, words):
  logits = model(words[:, :-1]).astype(jnp.float32)
  return optax.softmax_cross_entropy_with_integer_labels(
    logits, words[:, 1:]
  ).mean()


def train(make, dtype, seed=0, rank=0):
  """Losses of all steps, with what `make` makes of a rate; parameters.

  Given a rank, only the matrices of LoRA are trained, in the given dtype.
  """
  model = Model(nnx.Rngs(seed), rank)
  which = nnx.LoRAParam if rank else nnx.Param
  if dtype == jnp.bfloat16:
    nnx.update(model, optax_mp.cast(nnx.state(model, which)))
  optimizer = nnx.Optimizer(model, make(RATE), wrt=which)

  @nnx.jit
  def train_step(model, optimizer, words):
    diff = nnx.DiffState(0, which)
    loss, gradients = nnx.value_and_grad(loss_fn, argnums=diff)(model, words)
    optimizer.update(model, gradients)
    return loss

  batches = data.sentences(STEPS, seed)
  losses = [train_step(model, optimizer, words) for words in batches]
  return losses, nnx.state(model, which)


train_lora = functools.partial(train, rank=8)
