# SPDX-License-Identifier: Apache-2.0
"""Transformations that every client trains with, and what is claimed."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

import optax_mp
from optax_mp import formats

BF16 = jnp.bfloat16
# A client's program: of what makes a transformation and of a dtype, to the
# losses of its steps and its parameters.
Train = Callable[..., tuple[Any, Any]]
LAST = 5  # steps whose mean loss is a run's final loss


@dataclasses.dataclass(frozen=True)
class Row:
  """One of our transformations, and what it replaces."""

  ours: Callable[[float], Any]  # of a learning rate, for bfloat16 parameters
  theirs: str  # in `FLOAT32`: what the client's own float32 run trains with
  share: float = 0.5  # of the spread over seeds, by which losses may differ


# Their rates, in units of what Adam takes.
FLOAT32 = {
  'adamw': lambda lr: optax.adamw(lr, weight_decay=0.01),
  'nadamw': lambda lr: optax.nadamw(lr, weight_decay=0.01),
  'lion': lambda lr: optax.lion(lr / 5, weight_decay=0.01),
  'sgd': lambda lr: optax.sgd(10 * lr, momentum=0.9),
  'muon': lambda lr: contrib.muon(4 * lr, adam_learning_rate=lr),
  'ademamix': lambda lr: contrib.ademamix(lr, weight_decay=0.01),
  'came': lambda lr: optax_mp.came(lr / 5, weight_decay=0.01),
  'adam_mini': lambda lr: optax_mp.adam_mini(
    lr, blocks=optax_mp.optimizers.adam_mini_blocks(1), weight_decay=0.01
  ),
  'micro_adam': lambda lr: optax_mp.micro_adam(lr, density=0.1),
}


def recipe(make, theirs, scale=1.0, share=0.5, **settings):
  """A recipe, which compresses whatever its size."""
  return Row(lambda lr: make(scale * lr, min_size=0, **settings), theirs, share)


def around(theirs, rule, share=0.5):
  """Both wrappers around what trains in float32."""

  def make(lr):
    inner = optax_mp.compressed(FLOAT32[theirs](lr), rule, min_size=0)
    return optax_mp.compensated(inner, residual_bits=8)

  return Row(make, theirs, share)


DECAY = {'weight_decay': 0.01}
OURS = {
  'adamw_bf16': recipe(optax_mp.adamw_bf16, 'adamw', **DECAY),
  'adamw_8bit': recipe(optax_mp.adamw_8bit, 'adamw', **DECAY),
  # 16 codes: 0.53 of the spread in LoRA's first steps, less elsewhere.
  'adamw_4bit': recipe(optax_mp.adamw_4bit, 'adamw', share=1.0, **DECAY),
  # Another optimizer: rows times columns in place of the second moment.
  'adamw_4bit_factored': recipe(
    optax_mp.adamw_4bit_factored, 'adamw', share=1.5, **DECAY
  ),
  'coat_adamw': recipe(optax_mp.coat_adamw, 'adamw', **DECAY),
  'flash_adamw': recipe(optax_mp.flash_adamw, 'adamw', **DECAY),
  'lion_8bit': recipe(optax_mp.lion_8bit, 'lion', 0.2, **DECAY),
  'sgdm_8bit': recipe(optax_mp.sgdm_8bit, 'sgd', 10.0),
  'muon_8bit': Row(
    lambda lr: optax_mp.muon_8bit(4 * lr, adam_learning_rate=lr, min_size=0),
    'muon',
  ),
  'ademamix_8bit': recipe(optax_mp.ademamix_8bit, 'ademamix', **DECAY),
  'nadamw, 8 bits': around(
    'nadamw',
    {'mu': formats.BlockInt(8), 'nu': formats.BlockInt(8, signed=False)},
  ),
  # Noise of 8 bits in its factors: 0.4 to 0.7 of the spread, by the version.
  'came, bfloat16': around('came', formats.BFloat16('stochastic'), share=1.0),
  'adam_mini, 8 bits': around('adam_mini', {'mu': formats.BlockInt(8)}),
  'micro_adam': Row(
    lambda lr: optax_mp.compensated(FLOAT32['micro_adam'](lr), 8), 'micro_adam'
  ),
}

# The others are in the table alone: what they store is tested by these.
TESTED = tuple(n for n in OURS if n not in ('nadamw, 8 bits', 'micro_adam'))


def final(losses: Any) -> float:
  """A run's final loss, less noisy than that of its last step."""
  return float(np.mean(np.asarray(losses, np.float32)[-LAST:]))


@functools.cache
def float32(train: Train, theirs: str) -> float:
  """What a client's own float32 run ends with."""
  return final(train(FLOAT32[theirs], jnp.float32)[0])


def check(train: Train, name: str, spread: float) -> None:
  """kind: claim. Ours ends where float32 does, and stays in bfloat16.

  Args:
    train: a client's program.
    name: of ours.
    spread: the standard deviation of the client's final losses, in float32
      with AdamW, over seeds: a different optimizer would be as far off.
  """
  row = OURS[name]
  losses, params = train(row.ours, BF16)
  dtypes = {x.dtype for x in jax.tree.leaves(params)}
  assert dtypes == {jnp.dtype(BF16)}, f'parameters are in {dtypes}'
  ours, theirs = final(losses), float32(train, row.theirs)
  distance = abs(ours - theirs)
  assert distance <= row.share * spread, (
    f'{ours:.4f} is not within {row.share} x {spread} of {theirs:.4f}'
  )


# Broken on purpose: what a claim must notice.


def stands_still(lr):
  """Updates are lost."""
  del lr
  return optax.set_to_zero()


def forgets(lr):
  """Codes of moments come back as others."""
  tx = OURS['adamw_8bit'].ours(lr)

  def update(gradients, state, params):
    updates, state = tx.update(gradients, state, params)
    return updates, jax.tree.map(mixed_up, state)

  return optax.GradientTransformation(tx.init, update)


def mixed_up(x):
  is_code = x.ndim > 1 and x.dtype in (jnp.int8, jnp.uint8)
  return x ^ jnp.asarray(0x5A, x.dtype) if is_code else x


BROKEN = {
  'stands still': Row(stands_still, 'adamw'),
  'forgets': Row(forgets, 'adamw'),
}


def check_notices(train: Train, spread: float) -> None:
  """Both are further off than any of ours may be."""
  widest = max(row.share for row in OURS.values()) * spread
  for name, row in BROKEN.items():
    losses, _ = train(row.ours, BF16)
    distance = abs(final(losses) - float32(train, row.theirs))
    assert not distance <= 2 * widest, f'{name} passes: {distance:.4f}'
