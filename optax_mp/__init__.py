# SPDX-License-Identifier: Apache-2.0
"""Train Flax models with Optax in a fraction of the memory.

Parameters and moments live in bfloat16, what rounding removes is fed back, and
around it is any Optax optimizer, in float32.
"""

from optax_mp import backward as backward
from optax_mp import checkpoint as checkpoint
from optax_mp import formats as formats
from optax_mp import memory as memory
from optax_mp import optimizers as optimizers
from optax_mp._cast import cast as cast
from optax_mp._inject import InjectedState as InjectedState
from optax_mp._inject import inject_hyperparams as inject_hyperparams
from optax_mp._recipes import adamw_4bit as adamw_4bit
from optax_mp._recipes import adamw_4bit_factored as adamw_4bit_factored
from optax_mp._recipes import adamw_8bit as adamw_8bit
from optax_mp._recipes import adamw_bf16 as adamw_bf16
from optax_mp._recipes import ademamix_8bit as ademamix_8bit
from optax_mp._recipes import coat_adamw as coat_adamw
from optax_mp._recipes import flash_adamw as flash_adamw
from optax_mp._recipes import lion_8bit as lion_8bit
from optax_mp._recipes import lion_bf16 as lion_bf16
from optax_mp._recipes import muon_8bit as muon_8bit
from optax_mp._recipes import sgdm_8bit as sgdm_8bit
from optax_mp._recipes import sgdm_bf16 as sgdm_bf16
from optax_mp.optimizers import adagrad_sn as adagrad_sn
from optax_mp.optimizers import adagrad_snsm as adagrad_snsm
from optax_mp.optimizers import adalomo as adalomo
from optax_mp.optimizers import adam_mini as adam_mini
from optax_mp.optimizers import adamw_sm as adamw_sm
from optax_mp.optimizers import adamw_sn as adamw_sn
from optax_mp.optimizers import adamw_snsm as adamw_snsm
from optax_mp.optimizers import apollo as apollo
from optax_mp.optimizers import apollo_mini as apollo_mini
from optax_mp.optimizers import came as came
from optax_mp.optimizers import fira as fira
from optax_mp.optimizers import galore as galore
from optax_mp.optimizers import grass as grass
from optax_mp.optimizers import hfac as hfac
from optax_mp.optimizers import lomo as lomo
from optax_mp.optimizers import micro_adam as micro_adam
from optax_mp.optimizers import rmsprop_sn as rmsprop_sn
from optax_mp.optimizers import sgd_sm as sgd_sm
from optax_mp.sharding import state_shardings as state_shardings
from optax_mp.wrappers import CompensatedState as CompensatedState
from optax_mp.wrappers import CompressedState as CompressedState
from optax_mp.wrappers import SkipNonfiniteState as SkipNonfiniteState
from optax_mp.wrappers import compensated as compensated
from optax_mp.wrappers import compressed as compressed
from optax_mp.wrappers import skip_nonfinite as skip_nonfinite

__all__ = (
  'CompensatedState',
  'CompressedState',
  'InjectedState',
  'SkipNonfiniteState',
  'adagrad_sn',
  'adagrad_snsm',
  'adalomo',
  'adam_mini',
  'adamw_4bit',
  'adamw_4bit_factored',
  'adamw_8bit',
  'adamw_bf16',
  'adamw_sm',
  'adamw_sn',
  'adamw_snsm',
  'ademamix_8bit',
  'apollo',
  'apollo_mini',
  'backward',
  'came',
  'cast',
  'checkpoint',
  'coat_adamw',
  'compensated',
  'compressed',
  'fira',
  'flash_adamw',
  'formats',
  'galore',
  'grass',
  'hfac',
  'inject_hyperparams',
  'lion_8bit',
  'lion_bf16',
  'lomo',
  'memory',
  'micro_adam',
  'muon_8bit',
  'optimizers',
  'rmsprop_sn',
  'sgd_sm',
  'sgdm_8bit',
  'sgdm_bf16',
  'skip_nonfinite',
)
