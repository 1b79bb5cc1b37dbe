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
from optax_mp.optimizers import adalomo as adalomo
from optax_mp.optimizers import came as came
from optax_mp.optimizers import hfac as hfac
from optax_mp.optimizers import lomo as lomo
from optax_mp.wrappers import CompensatedState as CompensatedState
from optax_mp.wrappers import CompressedState as CompressedState
from optax_mp.wrappers import compensated as compensated
from optax_mp.wrappers import compressed as compressed

__all__ = (
  'CompensatedState',
  'CompressedState',
  'adalomo',
  'adamw_4bit',
  'adamw_4bit_factored',
  'adamw_8bit',
  'adamw_bf16',
  'ademamix_8bit',
  'backward',
  'came',
  'checkpoint',
  'coat_adamw',
  'compensated',
  'compressed',
  'flash_adamw',
  'formats',
  'hfac',
  'lion_8bit',
  'lion_bf16',
  'lomo',
  'memory',
  'muon_8bit',
  'optimizers',
  'sgdm_8bit',
  'sgdm_bf16',
)
