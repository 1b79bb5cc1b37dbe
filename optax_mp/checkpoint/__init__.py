# SPDX-License-Identifier: Apache-2.0
"""Converts checkpoints: to and from float32, plain Optax and other formats."""

from optax_mp.checkpoint._arrays import from_arrays as from_arrays
from optax_mp.checkpoint._arrays import to_arrays as to_arrays
from optax_mp.checkpoint._convert import convert as convert
from optax_mp.checkpoint._convert import from_optax as from_optax
from optax_mp.checkpoint._convert import to_optax as to_optax
from optax_mp.checkpoint._float32 import from_float32 as from_float32
from optax_mp.checkpoint._float32 import to_float32 as to_float32
from optax_mp.checkpoint._rebuild import rebuild as rebuild

__all__ = (
  'convert',
  'from_arrays',
  'from_float32',
  'from_optax',
  'rebuild',
  'to_arrays',
  'to_float32',
  'to_optax',
)
