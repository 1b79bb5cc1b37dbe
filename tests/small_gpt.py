# SPDX-License-Identifier: Apache-2.0
"""The GPT of the examples, at a size of seconds."""

import dataclasses
import functools

import quick
import train_gpt

SMALL = train_gpt.Config(
  layers=2,
  width=64,
  heads=2,
  context=16,
  batch=2,
  steps=24,
  warmup=4,
  validate_every=12,
  validation_batches=2,
)


def config(**changes):
  return dataclasses.replace(SMALL, **changes)


# Compared to the last bit, and so compiled as for everybody.
EXACT = [
  config(optimizer=optimizer, update=update)
  for optimizer in train_gpt.OPTIMIZERS
  for update in ('fused', 'separate')
]


def _quickly(*args):
  with quick.ahead():
    return train_gpt.compile_donated(*args)


@functools.cache
def setup(config):
  compiler = None if config in EXACT else _quickly
  built = train_gpt.setup(config, compiler=compiler)
  return built._replace(validate=_validate())


@functools.cache
def _validate():
  """One for all: neither optimizer nor update is in it."""
  return quick.jit(train_gpt.loss_of(SMALL))


def train(config):
  """Compiles each program once, whatever the length and the checkpoints."""
  plain = {'checkpoint': '', 'save_every': 100}
  return train_gpt.train(config, setup(dataclasses.replace(config, **plain)))


def losses(config, steps=None):
  """Losses of the first `steps` steps; then the reader stops reading."""
  records = train(config)
  losses = {}
  for record in records:
    losses[record.step] = record.loss
    if record.step == steps:
      records.close()
  return losses
