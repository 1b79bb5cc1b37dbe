# SPDX-License-Identifier: Apache-2.0
"""H-Fac: Optimization with Factorized Hamiltonian Descent (2406.09958).

Momentum and squares, both as rows and columns. Experimental.
"""

from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import optax

from optax_mp._core import _hyperparams
from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _checks
from optax_mp.optimizers._core import _factored
from optax_mp.optimizers._core import _groups
from optax_mp.optimizers._core import _trees

NOTHING = _trees.NOTHING


class ScaleByHfacState(NamedTuple):
  """Both moments as rows and columns; in full of vectors and scalars.

  What a leaf has not is no array.
  """

  count: chex.Array  # (), int32
  mu: Any  # like vectors and scalars, float32
  nu: Any  # like vectors and scalars, float32
  mu_row: Any  # (..., m), float32: means of gradients along rows
  mu_col: Any  # (..., n), float32: along columns
  nu_row: Any  # (..., m), float32: sums of squares along rows
  nu_col: Any  # (..., n), float32: along columns


def scale_by_hfac(
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  eps: chex.Numeric = 1e-30,
  *,
  clip_threshold: chex.Numeric = 1.0,
  adam_eps: chex.Numeric = 1e-8,
) -> optax.GradientTransformationExtraArgs:
  """The experimental update of :func:`hfac`, without its learning rate.

  Args:
    b1: for this and all others see :func:`hfac`.
    b2: decay of the squares.
    eps: added to squares.
    clip_threshold: for the root mean square.
    adam_eps: Adam's eps, for leaves with fewer than two axes.

  Returns:
    A transformation.

  Raises:
    ValueError: as :func:`hfac` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_mp import optimizers
    >>> params = {'w': jnp.ones((4, 8))}
    >>> tx = optimizers.scale_by_hfac()
    >>> updates, state = tx.update(params, tx.init(params))
    >>> state.mu_row['w'].shape, state.nu_col['w'].shape
    ((4,), (8,))
  """
  _checks.decays(b1=b1, b2=b2)
  _checks.positive(eps=eps, clip_threshold=clip_threshold, adam_eps=adam_eps)

  def init_fn(params):
    mu, *mu_factors = _factored.zeros(params, _is_matrix)
    nu, *nu_factors = _factored.zeros(params, _is_matrix)
    count = jnp.zeros((), jnp.int32)
    return ScaleByHfacState(count, mu, nu, *mu_factors, *nu_factors)

  def update_fn(updates, state, params=None):
    del params
    count = _trees.increment(state.count)
    decays = _corrected(b1, count), _corrected(b2, count)
    own_eps = adam_eps * jnp.sqrt(_adam.weight(count, b2))

    def leaf(g, mu, nu, *factors):
      if not _is_matrix(g):
        moments = _adam.adam_form(g, mu, nu, count, b1, b2, own_eps)
        return *moments, *[NOTHING] * 4
      u, *factors = _by_factors(
        _factored.squeezed(g), factors, decays, eps, clip_threshold
      )
      return _factored.expanded(u, g), NOTHING, NOTHING, *factors

    updates, *moments = _trees.map_leaves(leaf, updates, state[1:])
    return updates, ScaleByHfacState(count, *moments)

  return _trees.in_float32(optax.GradientTransformation(init_fn, update_fn))


@_hyperparams.factory()
def hfac(
  learning_rate: optax.ScalarOrSchedule,
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  *,
  eps: chex.Numeric = 1e-30,
  clip_threshold: chex.Numeric = 1.0,
  adam_eps: chex.Numeric = 1e-8,
  weight_decay: chex.Numeric = 0.0,
  mask: _adam.Mask = None,
  matrices: _groups.Matrices = None,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Experimental: four vectors for both moments of a matrix.

  As third parties transcribe the paper; not compared with its text. Its authors
  may have other equations and other defaults, and what they do to vectors and
  to stacks is not known here.

  **Stored:** of a matrix (m, n) four vectors in float32, 8 (m + n) bytes; of
  other leaves Adam's 8 per parameter. With t = 1 at the first step

  .. math::
    \hat b_i &= b_i (1 - b_i^{t-1}) / (1 - b_i^t) \\
    u &\leftarrow \hat b_1 u + (1 - \hat b_1) \mathrm{mean}_{row}(G), \quad
      v \leftarrow \hat b_1 v + (1 - \hat b_1) \mathrm{mean}_{col}(G) \\
    r &\leftarrow \hat b_2 r + (1 - \hat b_2)
      \mathrm{sum}_{row}(G^2 + \epsilon), \quad
      s \leftarrow \hat b_2 s + (1 - \hat b_2)
      \mathrm{sum}_{col}(G^2 + \epsilon) \\
    \phi_i &= \hat b_1 (u - \mathrm{mean}_{row}(G))_i / \sqrt{r_i / n}, \quad
      \psi_j = \hat b_1 (v - \mathrm{mean}_{col}(G))_j / \sqrt{s_j / m} \\
    X_{ij} &= G_{ij} / \sqrt{r_i s_j / \textstyle\sum r}, \quad
      X \leftarrow X / \max(1, \mathrm{RMS}(X) / d) \\
    \Delta W_{ij} &= -\eta \left( X_{ij} + (\phi_i + \psi_j) / 2
      + \lambda W_{ij} \right)

  that is Adafactor's step, and how far rows and columns are from their
  momentum. Leaves with fewer than two axes get Adam.

  Args:
    learning_rate: eta, a number or a schedule.
    b1: decay of the momentum.
    b2: decay of the squares.
    eps: added to squares, larger than 0.
    clip_threshold: d. RMS(X) is of one matrix, also in a stack (L, m, n), which
      trains as its L layers would apart.
    adam_eps: Adam's eps, for leaves with fewer than two axes.
    weight_decay: lambda.
    mask: what to decay, see ``optax.adamw``.
    matrices: a tree of bools, or a function from parameters to one such as
      :func:`hidden_matrices`: what H-Fac is for; the rest gets AdamW, moments
      in float32. None: all leaves.
    adam_learning_rate: for that rest, if not ``learning_rate``.

  Returns:
    A transformation.

  Raises:
    ValueError: for a decay outside [0, 1), or an eps or threshold of 0.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_mp
    >>> params = {'w': jnp.ones((1024, 1024))}
    >>> plan = optax_mp.memory.plan(optax_mp.hfac(1e-3), params, gradients=None)
    >>> print(f'{plan.bytes_per_param - 4:.3f}')
    0.016

  **Savings:** all of Adam's state but some vectors.

  **Caveats:** X is of the last gradient alone: momentum is kept of means of
  rows and columns only. r and s are sums and overflow before means would: with
  1e4 columns at gradients of 2e17. Leading axes are batch axes: of a
  convolution the last two should be its channels, as in Flax, but two or more
  last axes of length 1 do not count, those of PyTorch's 1x1 kernels. A stack of
  vectors (L, n) looks like one matrix: see ``matrices``. Under
  ``optax.inject_hyperparams``, ``static_args`` are matrices and mask.

  References:
    Nguyen et al., `Memory-Efficient Optimization with Factorized Hamiltonian
    Descent <https://arxiv.org/abs/2406.09958>`_, 2024
  """
  scale = scale_by_hfac(
    b1, b2, eps, clip_threshold=clip_threshold, adam_eps=adam_eps
  )
  return _groups.with_rates(
    scale,
    _adam.scale_by_adam(b1, b2, adam_eps),
    _adam.decay_before_step,
    (learning_rate, adam_learning_rate),
    (weight_decay, mask),
    matrices,
  )


def _by_factors(g, factors, decays, eps, threshold):
  """The update of matrices, and their moments after this step."""
  (m, n), (b1, b2) = g.shape[-2:], decays
  mu_row, mu_col, nu_row, nu_col = factors
  row, col = jnp.mean(g, axis=-1), jnp.mean(g, axis=-2)
  mu_row = _factored.decay(row, mu_row, b1)
  mu_col = _factored.decay(col, mu_col, b1)
  square = jnp.square(g) + eps
  nu_row = _factored.decay(jnp.sum(square, axis=-1), nu_row, b2)
  nu_col = _factored.decay(jnp.sum(square, axis=-2), nu_col, b2)
  phi = b1 * (mu_row - row) / jnp.sqrt(nu_row / n)
  psi = b1 * (mu_col - col) / jnp.sqrt(nu_col / m)
  u = _factored.normalized(g, nu_row, nu_col) * jnp.sqrt(float(m))
  u = _factored.clip_by_rms(u, threshold, per_slice=True)
  u = u + (phi[..., :, None] + psi[..., None, :]) / 2
  return u, mu_row, mu_col, nu_row, nu_col


def _corrected(b: chex.Numeric, step: chex.Array) -> chex.Array:
  """The decay b (1 - b^(t-1)) / (1 - b^t), which is 0 at t = 1."""
  share = (1.0 - b) / _adam.weight(step, b)
  return jnp.where(step > 1, 1.0 - share, 0.0)


def _is_matrix(p: chex.Array) -> bool:
  return _factored.is_factored(p.shape)
