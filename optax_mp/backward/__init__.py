# SPDX-License-Identifier: Apache-2.0
"""The optimizer's step inside the backward pass: no whole gradient exists.

Of a stack of layers that is scanned, JAX stacks all gradients before any of
them is used. Here the backward pass walks the layers itself: it recomputes a
layer, takes its gradient, updates its parameters and its optimizer state where
they lie, and forgets the gradient. After Lv et al., `Full Parameter Fine-tuning
for Large Language Models with Limited Resources` (LOMO, arXiv 2306.09782), and
Lewandowski and Kosson, `Memory Efficient Mixed-Precision Optimizers` (arXiv
2309.12381).
"""

from optax_mp.backward._fused import FusedStep as FusedStep
from optax_mp.backward._fused import fused_step as fused_step
from optax_mp.backward._step import FusedState as FusedState

__all__ = ('FusedState', 'FusedStep', 'fused_step')
