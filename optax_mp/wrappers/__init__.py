# SPDX-License-Identifier: Apache-2.0
"""Wrappers: what of a training state is kept in a format."""

from optax_mp.wrappers._compensated import CompensatedState as CompensatedState
from optax_mp.wrappers._compensated import compensated as compensated
from optax_mp.wrappers._compressed import CompressedState as CompressedState
from optax_mp.wrappers._compressed import compressed as compressed

__all__ = (
  'CompensatedState',
  'CompressedState',
  'compensated',
  'compressed',
)
