# SPDX-License-Identifier: Apache-2.0
"""Wrappers: what of a training state is kept in a format."""

from optax_mp.wrappers._compensated import CompensatedState as CompensatedState
from optax_mp.wrappers._compensated import compensated as compensated
from optax_mp.wrappers._compressed import CompressedState as CompressedState
from optax_mp.wrappers._compressed import compressed as compressed
from optax_mp.wrappers._guard import SkipNonfiniteState as SkipNonfiniteState
from optax_mp.wrappers._guard import skip_nonfinite as skip_nonfinite

__all__ = (
  'CompensatedState',
  'CompressedState',
  'SkipNonfiniteState',
  'compensated',
  'compressed',
  'skip_nonfinite',
)
