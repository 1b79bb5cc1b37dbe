# SPDX-License-Identifier: Apache-2.0
"""Train Flax models with Optax in a fraction of the memory.

Parameters and moments live in bfloat16, what rounding removes is fed back, and
around it is any Optax optimizer, in float32.
"""

from optax_mp import checkpoint as checkpoint
from optax_mp import formats as formats
from optax_mp import memory as memory
from optax_mp._recipes import adamw_bf16 as adamw_bf16
from optax_mp._recipes import lion_bf16 as lion_bf16
from optax_mp._recipes import sgdm_bf16 as sgdm_bf16
from optax_mp.wrappers import CompensatedState as CompensatedState
from optax_mp.wrappers import CompressedState as CompressedState
from optax_mp.wrappers import compensated as compensated
from optax_mp.wrappers import compressed as compressed

__all__ = (
  'CompensatedState',
  'CompressedState',
  'adamw_bf16',
  'checkpoint',
  'compensated',
  'compressed',
  'formats',
  'lion_bf16',
  'memory',
  'sgdm_bf16',
)
