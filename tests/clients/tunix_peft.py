# SPDX-License-Identifier: Apache-2.0
"""google-tunix: a language model with LoRA, by its `PeftTrainer`."""

from flax import nnx
import jax.numpy as jnp
from tunix.sft import peft_trainer

from clients import data
from clients import nnx_lm
import optax_mp

RATE, STEPS, RANK = 1e-2, 40, 8


class Losses(peft_trainer.hooks.TrainingHooks):
  """What the trainer reports."""

  def __init__(self):
    self.losses = []

  def on_train_start(self, train_ctx):
    pass

  def on_train_end(self, train_ctx):
    pass

  def on_train_step_start(self, train_ctx):
    pass

  def on_train_step_end(self, train_ctx, train_step, train_loss):
    self.losses.append(train_loss)

  def on_eval_step_start(self, train_ctx):
    pass

  def on_eval_step_end(self, train_ctx, eval_loss):
    pass


class Model(nnx_lm.Model):
  """With the arguments that the trainer's default loss passes."""

  def __call__(self, tokens, positions, cache, mask):
    del positions, mask
    return super().__call__(tokens), cache


def model_input(words):
  return {
    'input_tokens': words['input_tokens'],
    'input_mask': jnp.ones_like(words['input_tokens']),
    'positions': jnp.arange(words['input_tokens'].shape[1]),
    'attention_mask': None,
  }


def train(
  make, dtype, seed=0, rank=RANK, micro_steps=1, folder=None, steps=STEPS
):
  """Losses of all steps, with what `make` makes of a rate; parameters.

  Without a rank all parameters are trained. Steps that a checkpoint of the
  folder has seen are not repeated.
  """
  model = Model(nnx.Rngs(seed), rank)
  which = nnx.LoRAParam if rank else nnx.Param
  if dtype == jnp.bfloat16:
    nnx.update(model, optax_mp.cast(nnx.state(model, which)))
  config = peft_trainer.TrainingConfig(
    eval_every_n_steps=10**6,
    max_steps=steps,
    gradient_accumulation_steps=micro_steps if micro_steps > 1 else None,
    checkpoint_root_directory=str(folder) if folder else None,
  )
  trainer = peft_trainer.PeftTrainer(model, make(RATE), config)
  trainer = trainer.with_gen_model_input_fn(model_input)
  reports = Losses()
  trainer.with_training_hooks(reports)
  batches = data.sentences(micro_steps * steps, seed)
  trainer.train({'input_tokens': words} for words in batches)
  return reports.losses, nnx.state(model, which)
