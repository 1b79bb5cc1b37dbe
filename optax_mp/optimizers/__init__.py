# SPDX-License-Identifier: Apache-2.0
"""Optimizers of papers, each on top of Optax: one paper, one file.

All compute in float32, whatever the gradients are, and know nothing of storage:
their states are for :func:`optax_mp.compressed`, their parameters for
:func:`optax_mp.compensated`.
"""

from optax_mp.optimizers._came import ScaleByCameState as ScaleByCameState
from optax_mp.optimizers._came import came as came
from optax_mp.optimizers._came import scale_by_came as scale_by_came
from optax_mp.optimizers._core._groups import hidden_matrices as hidden_matrices

__all__ = (
  'ScaleByCameState',
  'came',
  'hidden_matrices',
  'scale_by_came',
)
