# SPDX-License-Identifier: Apache-2.0
"""CAME: Confidence-guided Adaptive Memory Efficient Optimization (2307.02047).

Adafactor with a momentum, damped where the update disagrees with it.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_mp._core import _hyperparams
from optax_mp.formats import _base
from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _checks
from optax_mp.optimizers._core import _factored
from optax_mp.optimizers._core import _groups
from optax_mp.optimizers._core import _trees

NOTHING = _trees.NOTHING


class ScaleByCameState(NamedTuple):
  """Momentum in full, squares and disagreements as rows and columns.

  Of a leaf with fewer than two axes, or one that is not factored, ``nu`` is
  there in full and the last four are not.
  """

  mu: optax.Updates  # like the parameters, float32
  nu: Any  # like those that are not factored, float32
  nu_row: Any  # (..., m), float32: mean squares of gradients along rows
  nu_col: Any  # (..., n), float32: along columns
  res_row: Any  # (..., m), float32: of what the momentum is away from updates
  res_col: Any  # (..., n), float32


def scale_by_came(
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  b3: chex.Numeric = 0.9999,
  *,
  eps1: chex.Numeric = 1e-30,
  eps2: chex.Numeric = 1e-16,
  clip_threshold: chex.Numeric = 1.0,
  min_dim_size_to_factor: int = 1,
  per_slice_clip: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """The confidence-guided update of :func:`came`, without its learning rate.

  Args:
    b1: for this and all others see :func:`came`.
    b2: decay of the mean squares.
    b3: decay of the disagreement.
    eps1: added to squares of gradients.
    eps2: added to squared disagreements.
    clip_threshold: for the root mean square.
    min_dim_size_to_factor: of the last two axes.
    per_slice_clip: or over the whole leaf.

  Returns:
    A transformation.

  Raises:
    ValueError: as :func:`came` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_mp import optimizers
    >>> params = {'w': jnp.ones((4, 8))}
    >>> tx = optimizers.scale_by_came()
    >>> updates, state = tx.update(params, tx.init(params))
    >>> state.nu_row['w'].shape, state.nu_col['w'].shape
    ((4,), (8,))
  """
  _checks.positive(eps1=eps1, eps2=eps2, clip_threshold=clip_threshold)
  _checks.decays(b1=b1, b2=b2, b3=b3)
  _checks.whole(min_dim_size_to_factor=min_dim_size_to_factor)
  _base.check_static(per_slice_clip, 'per_slice_clip')

  def factored(p):
    return _factored.is_factored(p.shape, min_dim_size_to_factor)

  def init_fn(params):
    mu = jax.tree.map(_trees.zeros, params)
    squares = _factored.zeros(params, factored)
    _, *residuals = _factored.zeros(params, factored)
    return ScaleByCameState(mu, *squares, *residuals)

  def whole(g, mu, nu):
    nu = _factored.decay(jnp.square(g) + eps1, nu, b2)
    u = g / jnp.sqrt(nu)
    u = _factored.clip_by_rms(u, clip_threshold, per_slice_clip)
    mu = _factored.decay(u, mu, b1)
    return mu, mu, nu

  def by_factors(g, mu, row, col, res_row, res_col):
    row, col = _averaged(jnp.square(g) + eps1, row, col, b2)
    u = _factored.normalized(g, row, col)
    u = _factored.clip_by_rms(u, clip_threshold, per_slice_clip)
    mu = _factored.decay(u, mu, b1)
    away = jnp.square(jnp.subtract(u, mu)) + eps2
    res_row, res_col = _averaged(away, res_row, res_col, b3)
    damped = _factored.normalized(mu, res_row, res_col)
    return damped, mu, row, col, res_row, res_col

  def leaf(g, mu, nu, *factors):
    if not factored(g):
      return *whole(g, mu, nu), *[NOTHING] * 4
    matrices = _factored.squeezed(g), _factored.squeezed(mu)
    u, mu, *factors = by_factors(*matrices, *factors)
    u, mu = _factored.expanded(u, g), _factored.expanded(mu, g)
    return u, mu, NOTHING, *factors

  def update_fn(updates, state, params=None):
    del params
    updates, *state = _trees.map_leaves(leaf, updates, state)
    return updates, ScaleByCameState(*state)

  return _trees.in_float32(optax.GradientTransformation(init_fn, update_fn))


@_hyperparams.factory()
def came(
  learning_rate: optax.ScalarOrSchedule,
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  b3: chex.Numeric = 0.9999,
  *,
  eps1: chex.Numeric = 1e-30,
  eps2: chex.Numeric = 1e-16,
  clip_threshold: chex.Numeric = 1.0,
  weight_decay: chex.Numeric = 0.0,
  mask: _adam.Mask = None,
  min_dim_size_to_factor: int = 1,
  per_slice_clip: bool = False,
  matrices: _groups.Matrices = None,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adafactor with a momentum that is damped where updates disagree with it.

  **Stored:** of a matrix (m, n) the momentum and four vectors, in float32:
  4 m n + 8 (m + n) bytes, a little over 4 per parameter; of other leaves 8 per
  parameter. With :math:`\mathrm{fac}(r, c)_{ij} = (r_i c_j /
  \mathrm{mean}(r))^{-1/2}`

  .. math::
    Q &= G^2 + \epsilon_1, \quad r \leftarrow b_2 r + (1 - b_2)
      \mathrm{mean}_{row}(Q), \quad c \leftarrow b_2 c + (1 - b_2)
      \mathrm{mean}_{col}(Q) \\
    U &= \mathrm{fac}(r, c) \cdot G, \quad
      U \leftarrow U / \max(1, \mathrm{RMS}(U) / d) \\
    M &\leftarrow b_1 M + (1 - b_1) U, \quad S = (U - M)^2 + \epsilon_2 \\
    R &\leftarrow b_3 R + (1 - b_3) \mathrm{mean}_{row}(S), \quad
      C \leftarrow b_3 C + (1 - b_3) \mathrm{mean}_{col}(S) \\
    u &= -\eta\, \mathrm{fac}(R, C) \cdot M - \eta \lambda W

  Leaves with fewer than two axes have :math:`v` in place of r and c, and M in
  place of its damped form.

  Args:
    learning_rate: eta, a number or a schedule; 0.5 to 0.9 of AdamW's.
    b1: decay of the momentum.
    b2: decay of the mean squares.
    b3: decay of the disagreement. The authors recommend ``0.9, 0.999`` with b3
      from 0.9995 to 0.99995, the default; and ``0.9, 0.95`` with b3 from 0.99
      to 0.999, ``0.995`` for a Llama of 1 B parameters.
    eps1: added to squares of gradients, larger than 0.
    eps2: added to squared disagreements, larger than 0.
    clip_threshold: d.
    weight_decay: lambda.
    mask: what to decay, see ``optax.adamw``.
    min_dim_size_to_factor: leaves with a shorter one among the last two axes
      keep 8 bytes per parameter.
    per_slice_clip: RMS(U) over each matrix of a stack (L, m, n), which then
      trains as its L layers would apart; else over all of the leaf, as in the
      official code.
    matrices: a tree of bools, or a function from parameters to one such as
      :func:`hidden_matrices`: what CAME is for; the rest gets AdamW, moments in
      float32. None: all leaves, as in the official code.
    adam_learning_rate: for that rest, if not ``learning_rate``.

  Returns:
    A transformation.

  Raises:
    ValueError: for a decay outside [0, 1), an eps or threshold of 0, or a
      ``min_dim_size_to_factor`` below 1.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_mp
    >>> params = {'w': jnp.ones((1024, 1024))}
    >>> plan = optax_mp.memory.plan(optax_mp.came(1e-4), params, gradients=None)
    >>> print(f'{plan.bytes_per_param - 4:.3f}')
    4.016

  **Savings:** half of Adam's state. Of that matrix 1.047 bytes are left with
  the momentum in 8 bits, ``compressed(came(1e-4), {'mu': BlockInt(8)})``.

  **Caveats:** with the default decays the first step of a matrix is
  (1 - b1) / (b1 sqrt(1 - b3)) = 11.1 learning rates long where magnitudes are
  alike, root mean square, up to 17.2 in runs of the official code; and the
  fifth of equal gradients is 24.6 long: warm up. With ``0.9, 0.95, 0.995`` it
  is 1.6, and 3.5. The first one of a vector is 0.1. Nothing corrects a bias.
  XLA:GPU keeps U between two kernels: 4 bytes for each value of one leaf.
  Under ``optax.inject_hyperparams``, ``static_args`` are
  min_dim_size_to_factor, matrices and mask.

  Leading axes are batch axes, but by default a stack (L, m, n) is clipped as
  one: then :func:`backward.fused_step`, which sees a layer at a time, takes
  other steps than ``update`` does on the stack. With ``per_slice_clip=True``
  both are the same. A stack of vectors (L, n) looks like one matrix in
  ``update``, like L vectors in ``fused_step``: see ``matrices``.

  Of a convolution the last two axes should be its channels, as in Flax. In
  PyTorch's order, (out, in, 3, 3), factors of 3 x 3 save nothing; two or more
  last axes of length 1 do not count, so that a 1x1 convolution, (out, in, 1,
  1), is the matrix (out, in).

  References:
    Luo et al., `CAME: Confidence-guided Adaptive Memory Efficient Optimization
    <https://arxiv.org/abs/2307.02047>`_, 2023
  """
  method = scale_by_came(
    b1,
    b2,
    b3,
    eps1=eps1,
    eps2=eps2,
    clip_threshold=clip_threshold,
    min_dim_size_to_factor=min_dim_size_to_factor,
    per_slice_clip=per_slice_clip,
  )
  return _groups.with_rates(
    method,
    _adam.scale_by_adam(b1, b2),
    _adam.decay_before_step,
    (learning_rate, adam_learning_rate),
    (weight_decay, mask),
    matrices,
  )


def _averaged(x, row, col, b):
  """Moving averages of the means of rows and of columns."""
  row = _factored.decay(jnp.mean(x, axis=-1), row, b)
  return row, _factored.decay(jnp.mean(x, axis=-2), col, b)
