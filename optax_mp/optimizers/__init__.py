# SPDX-License-Identifier: Apache-2.0
"""Optimizers of papers, each on top of Optax: one paper, one file.

All compute in float32, whatever the gradients are, and know nothing of storage:
their states are for :func:`optax_mp.compressed`, their parameters for
:func:`optax_mp.compensated`.
"""

from optax_mp.optimizers._adalomo import (
  ScaleByAdalomoState as ScaleByAdalomoState,
)
from optax_mp.optimizers._adalomo import adalomo as adalomo
from optax_mp.optimizers._adalomo import scale_by_adalomo as scale_by_adalomo
from optax_mp.optimizers._came import ScaleByCameState as ScaleByCameState
from optax_mp.optimizers._came import came as came
from optax_mp.optimizers._came import scale_by_came as scale_by_came
from optax_mp.optimizers._core._groups import hidden_matrices as hidden_matrices
from optax_mp.optimizers._hfac import ScaleByHfacState as ScaleByHfacState
from optax_mp.optimizers._hfac import hfac as hfac
from optax_mp.optimizers._hfac import scale_by_hfac as scale_by_hfac
from optax_mp.optimizers._lomo import lomo as lomo

__all__ = (
  'ScaleByAdalomoState',
  'ScaleByCameState',
  'ScaleByHfacState',
  'adalomo',
  'came',
  'hfac',
  'hidden_matrices',
  'lomo',
  'scale_by_adalomo',
  'scale_by_came',
  'scale_by_hfac',
)
