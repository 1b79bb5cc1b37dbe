# SPDX-License-Identifier: Apache-2.0
"""Named combinations of an Optax optimizer, formats and the two wrappers."""

from optax_mp._recipes._adamw import adamw_4bit as adamw_4bit
from optax_mp._recipes._adamw import adamw_4bit_factored as adamw_4bit_factored
from optax_mp._recipes._adamw import adamw_8bit as adamw_8bit
from optax_mp._recipes._bfloat16 import adamw_bf16 as adamw_bf16
from optax_mp._recipes._bfloat16 import lion_bf16 as lion_bf16
from optax_mp._recipes._bfloat16 import sgdm_bf16 as sgdm_bf16
from optax_mp._recipes._momentum import ademamix_8bit as ademamix_8bit
from optax_mp._recipes._momentum import lion_8bit as lion_8bit
from optax_mp._recipes._momentum import muon_8bit as muon_8bit
from optax_mp._recipes._momentum import sgdm_8bit as sgdm_8bit
from optax_mp._recipes._published import coat_adamw as coat_adamw
from optax_mp._recipes._published import flash_adamw as flash_adamw
