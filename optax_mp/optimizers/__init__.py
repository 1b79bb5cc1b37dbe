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
from optax_mp.optimizers._adam_mini._adam_mini import (
  ScaleByAdamMiniState as ScaleByAdamMiniState,
)
from optax_mp.optimizers._adam_mini._adam_mini import adam_mini as adam_mini
from optax_mp.optimizers._adam_mini._adam_mini import (
  scale_by_adam_mini as scale_by_adam_mini,
)
from optax_mp.optimizers._adam_mini._blocks import (
  adam_mini_blocks as adam_mini_blocks,
)
from optax_mp.optimizers._apollo._apollo import (
  ScaleByApolloState as ScaleByApolloState,
)
from optax_mp.optimizers._apollo._apollo import apollo as apollo
from optax_mp.optimizers._apollo._apollo import (
  scale_by_apollo as scale_by_apollo,
)
from optax_mp.optimizers._apollo._mini import apollo_mini as apollo_mini
from optax_mp.optimizers._came import ScaleByCameState as ScaleByCameState
from optax_mp.optimizers._came import came as came
from optax_mp.optimizers._came import scale_by_came as scale_by_came
from optax_mp.optimizers._core._groups import hidden_matrices as hidden_matrices
from optax_mp.optimizers._core._subsets import Blocks as Blocks
from optax_mp.optimizers._fira import ScaleByFiraState as ScaleByFiraState
from optax_mp.optimizers._fira import fira as fira
from optax_mp.optimizers._fira import scale_by_fira as scale_by_fira
from optax_mp.optimizers._galore import ScaleByGaloreState as ScaleByGaloreState
from optax_mp.optimizers._galore import galore as galore
from optax_mp.optimizers._galore import scale_by_galore as scale_by_galore
from optax_mp.optimizers._grass._grass import grass as grass
from optax_mp.optimizers._grass._inner import (
  ScaleByGrassState as ScaleByGrassState,
)
from optax_mp.optimizers._grass._inner import scale_by_grass as scale_by_grass
from optax_mp.optimizers._hfac import ScaleByHfacState as ScaleByHfacState
from optax_mp.optimizers._hfac import hfac as hfac
from optax_mp.optimizers._hfac import scale_by_hfac as scale_by_hfac
from optax_mp.optimizers._lomo import lomo as lomo
from optax_mp.optimizers._micro_adam._micro_adam import (
  ScaleByMicroAdamState as ScaleByMicroAdamState,
)
from optax_mp.optimizers._micro_adam._micro_adam import micro_adam as micro_adam
from optax_mp.optimizers._micro_adam._micro_adam import (
  scale_by_micro_adam as scale_by_micro_adam,
)
from optax_mp.optimizers._snsm._adagrad import adagrad_sn as adagrad_sn
from optax_mp.optimizers._snsm._adagrad import adagrad_snsm as adagrad_snsm
from optax_mp.optimizers._snsm._adamw import adamw_sn as adamw_sn
from optax_mp.optimizers._snsm._adamw import adamw_snsm as adamw_snsm
from optax_mp.optimizers._snsm._flavours import adamw_sm as adamw_sm
from optax_mp.optimizers._snsm._flavours import rmsprop_sn as rmsprop_sn
from optax_mp.optimizers._snsm._flavours import sgd_sm as sgd_sm
from optax_mp.optimizers._snsm._subset_norm import (
  ScaleBySubsetNormState as ScaleBySubsetNormState,
)
from optax_mp.optimizers._snsm._subset_norm import (
  scale_by_subset_norm as scale_by_subset_norm,
)
from optax_mp.optimizers._snsm._subspace_momentum import (
  ScaleBySubspaceMomentumState as ScaleBySubspaceMomentumState,
)
from optax_mp.optimizers._snsm._subspace_momentum import (
  scale_by_subspace_momentum as scale_by_subspace_momentum,
)

__all__ = (
  'Blocks',
  'ScaleByAdalomoState',
  'ScaleByAdamMiniState',
  'ScaleByApolloState',
  'ScaleByCameState',
  'ScaleByFiraState',
  'ScaleByGaloreState',
  'ScaleByGrassState',
  'ScaleByHfacState',
  'ScaleByMicroAdamState',
  'ScaleBySubsetNormState',
  'ScaleBySubspaceMomentumState',
  'adagrad_sn',
  'adagrad_snsm',
  'adalomo',
  'adam_mini',
  'adam_mini_blocks',
  'adamw_sm',
  'adamw_sn',
  'adamw_snsm',
  'apollo',
  'apollo_mini',
  'came',
  'fira',
  'galore',
  'grass',
  'hfac',
  'hidden_matrices',
  'lomo',
  'micro_adam',
  'rmsprop_sn',
  'scale_by_adalomo',
  'scale_by_adam_mini',
  'scale_by_apollo',
  'scale_by_came',
  'scale_by_fira',
  'scale_by_galore',
  'scale_by_grass',
  'scale_by_hfac',
  'scale_by_micro_adam',
  'scale_by_subset_norm',
  'scale_by_subspace_momentum',
  'sgd_sm',
)
