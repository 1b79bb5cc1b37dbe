# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks compare: a new recipe is one row here.

Optax's own optimizers in float32 are what each recipe is measured against, in
plain bfloat16 they are what happens without care.
"""

from collections.abc import Callable
import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

import optax_mp
import published


@dataclasses.dataclass(frozen=True)
class Contender:
  """An optimizer, and the dtype of the parameters that it is for."""

  make: Callable[..., optax.GradientTransformation]  # of a learning rate
  family: str  # which hyperparameters it takes: a key of `FAMILIES`
  dtype: Any  # of parameters and gradients

  @property
  def reference(self) -> str:
    """The contender in float32 of the same family."""
    return next(
      name
      for name, other in CONTENDERS.items()
      if other.family == self.family and other.dtype == jnp.float32
    )


@dataclasses.dataclass(frozen=True)
class Family:
  """Hyperparameters of one optimizer for a small language model."""

  learning_rate: float
  others: dict[str, Any]


# AdamW has the demo's learning rate, the others one that trains float32 well in
# `quality.py`. Nothing here was tuned for a format.
FAMILIES = {
  'adamw': Family(1e-3, {'b2': 0.99, 'weight_decay': 0.1}),
  'sgd': Family(0.1, {'momentum': 0.9}),
  'lion': Family(2e-4, {'b1': 0.95, 'b2': 0.98, 'weight_decay': 0.5}),
  'muon': Family(5e-3, {}),
  'ademamix': Family(1e-3, {'alpha': 2.0, 'weight_decay': 0.1}),
}


def _bits(recipe: Callable[..., Any], bits: int) -> Callable[..., Any]:
  return functools.partial(recipe, residual_bits=bits)


def _ours(recipe: Callable[..., Any], family: str) -> Contender:
  return Contender(recipe, family, jnp.bfloat16)


# What times, speeds and bytes are a ratio to, or stand beside.
REFERENCE = 'optax.adamw, float32'

CONTENDERS = {
  REFERENCE: Contender(optax.adamw, 'adamw', jnp.float32),
  'optax.adamw, bfloat16': Contender(optax.adamw, 'adamw', jnp.bfloat16),
  'adamw_bf16': _ours(optax_mp.adamw_bf16, 'adamw'),
  'adamw_bf16, 8': _ours(_bits(optax_mp.adamw_bf16, 8), 'adamw'),
  'adamw_bf16, 0': _ours(_bits(optax_mp.adamw_bf16, 0), 'adamw'),
  'adamw_8bit': _ours(optax_mp.adamw_8bit, 'adamw'),
  'adamw_4bit': _ours(optax_mp.adamw_4bit, 'adamw'),
  'adamw_4bit_factored': _ours(optax_mp.adamw_4bit_factored, 'adamw'),
  'coat_adamw': _ours(optax_mp.coat_adamw, 'adamw'),
  'flash_adamw': _ours(optax_mp.flash_adamw, 'adamw'),
  'optax.sgd, float32': Contender(
    functools.partial(optax.sgd, momentum=0.9), 'sgd', jnp.float32
  ),
  'sgdm_bf16': _ours(optax_mp.sgdm_bf16, 'sgd'),
  'sgdm_8bit': _ours(optax_mp.sgdm_8bit, 'sgd'),
  'optax.lion, float32': Contender(optax.lion, 'lion', jnp.float32),
  'lion_bf16': _ours(optax_mp.lion_bf16, 'lion'),
  'lion_8bit': _ours(optax_mp.lion_8bit, 'lion'),
  'optax.contrib.muon, float32': Contender(contrib.muon, 'muon', jnp.float32),
  'muon_8bit': _ours(optax_mp.muon_8bit, 'muon'),
  'optax.contrib.ademamix, float32': Contender(
    contrib.ademamix, 'ademamix', jnp.float32
  ),
  'ademamix_8bit': _ours(optax_mp.ademamix_8bit, 'ademamix'),
}


@dataclasses.dataclass(frozen=True)
class Paper:
  """An optimizer in float32, and where the search for its rate begins."""

  make: Callable[..., optax.GradientTransformation]  # of a learning rate
  learning_rate: float
  share_of_steps: float = 1.0  # of those that AdamW trains for
  others: str = ''  # the argument for the rate of what it is not for


def _weights(params: Any) -> Any:
  """Kernels and embeddings: in a stack, norms and biases have two axes, too."""

  def is_weight(path, _):
    return path[-1].key in ('kernel', 'embedding')

  return jax.tree.map_with_path(is_weight, params)


def _paper(
  make: Callable[..., Any], rate: float, share: float = 1.0, **settings: Any
) -> Paper:
  """An optimizer of ours; what it is not for has AdamW at AdamW's own rate."""
  own = inspect.signature(make).parameters
  others = next((k for k in own if k.endswith('_learning_rate')), '')
  make = functools.partial(make, **settings)
  return Paper(make, rate, share, others or 'adam_learning_rate')


# A quarter of the width of `quality.py`'s GPT, and as many heads as it has.
_RANK: dict[str, Any] = {'rank': 32}
_BLOCKS = {'blocks': optax_mp.optimizers.adam_mini_blocks(4)}
_WEIGHTS: dict[str, Any] = {'matrices': _weights}
ADAM_RATE = 2e-3

# What `papers.py` trains, with their defaults but for what depends on the width
# and for what is a weight: the GPT's layers are a stack.
PAPERS = {
  'optax.adamw': Paper(optax.adamw, ADAM_RATE),
  'optax.adafactor': Paper(
    functools.partial(optax.adafactor, multiply_by_parameter_scale=False), 2e-3
  ),
  'came': _paper(optax_mp.came, 1e-3, per_slice_clip=True, **_WEIGHTS),
  'came, b2=0.95, b3=0.995': _paper(
    optax_mp.came, 5e-4, b2=0.95, b3=0.995, per_slice_clip=True, **_WEIGHTS
  ),
  'adalomo': _paper(optax_mp.adalomo, 5e-2, **_WEIGHTS),
  'lomo': Paper(optax_mp.lomo, 1.0),
  'hfac': _paper(optax_mp.hfac, 2e-3, **_WEIGHTS),
  'adam_mini': Paper(functools.partial(optax_mp.adam_mini, **_BLOCKS), 2e-3),
  'rmsprop_sn': _paper(optax_mp.rmsprop_sn, 1e-2),
  'adamw_sn': _paper(optax_mp.adamw_sn, 2e-2),
  'adamw_snsm': _paper(optax_mp.adamw_snsm, 2e-2, **_RANK),
  'adamw_snsm, topk': _paper(
    optax_mp.adamw_snsm, 2e-2, projector='topk', **_RANK
  ),
  'adamw_snsm, half the steps': _paper(optax_mp.adamw_snsm, 2e-2, 0.5, **_RANK),
  'galore': _paper(optax_mp.galore, 1e-2, **_RANK),
  'fira': _paper(optax_mp.fira, 1e-2, **_RANK),
  'apollo': _paper(optax_mp.apollo, 1e-2, **_RANK),
  'apollo_mini': _paper(optax_mp.apollo_mini, 1e-2),
  'grass': _paper(optax_mp.grass, 1e-2, **_RANK),
  'micro_adam': Paper(optax_mp.micro_adam, 1e-3),
}


def _published(pair: published.Pair, *args: Any, **kwargs: Any):
  """AdamW with moments as others ship them, parameters as in our recipes."""
  inner = optax_mp.compressed(optax.adamw(*args, **kwargs), pair)
  return optax_mp.compensated(inner, 8)


# What `quality.py` trains: also the formats that others publish.
_OTHERS = (
  'bitsandbytes, 8 bits',
  'FlashOptim, 8 bits',
  'torchao, fp8',
  'COAT, fp8',
  'lpmm, 4 bits',
  'torchao, 4 bits',
)
STUDIED = CONTENDERS | {
  f'{name} (published)': _ours(
    functools.partial(_published, published.PUBLISHED[name]), 'adamw'
  )
  for name in _OTHERS
}
