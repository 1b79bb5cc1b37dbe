# SPDX-License-Identifier: Apache-2.0
"""AdaLomo: Low-memory Optimization with Adaptive Learning Rate (2310.10195).

Adafactor without a momentum, for the step inside the backward pass.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_mp._core import _hyperparams
from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _checks
from optax_mp.optimizers._core import _clipping
from optax_mp.optimizers._core import _factored
from optax_mp.optimizers._core import _groups
from optax_mp.optimizers._core import _trees

NOTHING = _trees.NOTHING


class ScaleByAdalomoState(NamedTuple):
  """Squares, as rows and columns; in full of a leaf with fewer than two axes.

  What a leaf has not is no array.
  """

  count: chex.Array  # (), int32
  nu: Any  # like vectors and scalars, float32
  nu_row: Any  # (..., m), float32: mean squares of gradients along rows
  nu_col: Any  # (..., n), float32: along columns


def scale_by_adalomo(
  decay_rate: chex.Numeric = -0.8,
  clip_threshold: chex.Numeric = 1.0,
  *,
  eps1: chex.Numeric = 1e-30,
  eps2: chex.Numeric = 1e-3,
) -> optax.GradientTransformationExtraArgs:
  r"""The update of :func:`adalomo`, without its learning rate.

  Args:
    decay_rate: for this and all others see :func:`adalomo`.
    clip_threshold: for the root mean square.
    eps1: added to squares of gradients.
    eps2: the smallest root mean square of weights that counts.

  Returns:
    A transformation from G to :math:`\max(\epsilon_2, \mathrm{RMS}(W)) U`,
    whose ``update`` needs the parameters.

  Raises:
    ValueError: as :func:`adalomo` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_mp import optimizers
    >>> params = {'w': jnp.ones((4, 8))}
    >>> tx = optimizers.scale_by_adalomo()
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> state.nu_row['w'].shape, state.nu_col['w'].shape
    ((4,), (8,))
  """
  _check_decay_rate(decay_rate)
  _checks.positive(clip_threshold=clip_threshold, eps1=eps1)
  _checks.not_negative(eps2=eps2)

  def init_fn(params):
    squares = _factored.zeros(params, _is_matrix)
    return ScaleByAdalomoState(jnp.zeros((), jnp.int32), *squares)

  def update_fn(updates, state, params=None):
    _trees.check_params(params)
    count = _trees.increment(state.count)
    b = 1.0 - jnp.power(count.astype(jnp.float32), decay_rate)

    def leaf(g, nu, row, col, w):
      u, *squares = _normalized(g, nu, row, col, b, eps1)
      u = _factored.clip_by_rms(u, clip_threshold, per_slice=True)
      return _scale(w, eps2) * u, *squares

    updates, *squares = _trees.map_leaves(leaf, updates, state[1:], params)
    return updates, ScaleByAdalomoState(count, *squares)

  return _trees.in_float32(optax.GradientTransformation(init_fn, update_fn))


@_hyperparams.factory()
def adalomo(
  learning_rate: optax.ScalarOrSchedule,
  decay_rate: chex.Numeric = -0.8,
  clip_threshold: chex.Numeric = 1.0,
  *,
  eps1: chex.Numeric = 1e-30,
  eps2: chex.Numeric = 1e-3,
  clip_value: chex.Numeric | None = None,
  weight_decay: chex.Numeric = 0.0,
  mask: _adam.Mask = None,
  matrices: _groups.Matrices = None,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adafactor's update, made to be run in the backward pass.

  **Stored:** of a matrix (m, n) two vectors in float32, 4 (m + n) bytes; of
  other leaves 4 per parameter. No momentum. With t = 1 at the first step and
  :math:`\mathrm{fac}(r, c)_{ij} = (r_i c_j / \mathrm{mean}(r))^{-1/2}`

  .. math::
    g &= k \cdot \min(\max(G / s, -v), v), \quad b = 1 - t^p, \quad
      Q = g^2 + \epsilon_1 \\
    r &\leftarrow b r + (1 - b) \mathrm{mean}_{row}(Q), \quad
      c \leftarrow b c + (1 - b) \mathrm{mean}_{col}(Q), \quad
      U = \mathrm{fac}(r, c) \cdot g \\
    U &\leftarrow U / \max(1, \mathrm{RMS}(U) / d), \quad
      a = \eta \max(\epsilon_2, \mathrm{RMS}(W)) \\
    u &= -a U - a \lambda W

  Leaves with fewer than two axes have the mean of Q itself, and
  :math:`U = g / \sqrt{\cdot}`. RMS(U) and RMS(W) are of one matrix each, also
  in a stack (L, m, n), which trains as its L layers would apart. So nothing
  needs all gradients at once, and :func:`backward.fused_step` takes the same
  steps as ``update`` does on whole stacks.

  Without ``weight_decay`` it is ``optax.adafactor(learning_rate,
  min_dim_size_to_factor=1, decay_rate=0.8)``. That one differs where gradients
  of 1e4 lie beside a row of zeros (NaN), in factoring the two longest axes and
  by default only axes of 128 or more, in state of the parameters' dtype, and in
  decay by ``weight_decay_rate`` times the weights, whatever the learning rate.

  Args:
    learning_rate: eta, a number or a schedule, relative to the weights: the
      authors train with 5e-4 for instructions, and with 1e-3 further.
    decay_rate: p, below 0.
    clip_threshold: d.
    eps1: added to squares of gradients, larger than 0.
    eps2: the smallest RMS(W) that counts.
    clip_value: v; None: no such clip.
    weight_decay: lambda.
    mask: what to decay, see ``optax.adamw``.
    matrices: a tree of bools, or a function from parameters to one such as
      :func:`hidden_matrices`: what AdaLomo is for; the rest gets AdamW, moments
      in float32. None: all leaves, as in the official code.
    adam_learning_rate: for that rest, if not ``learning_rate``, which would be
      a large one for AdamW.

  Returns:
    A transformation. Its ``update`` needs the parameters, and takes, by name,
    ``loss_scale``, s, and ``clip_coef``, k, as that of :func:`lomo` does.

  Raises:
    ValueError: for a ``decay_rate`` of 0 or more, an ``eps2`` below 0, or
      another threshold of 0 or less.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_mp
    >>> def block_fn(layer, h):
    ...   return h + jnp.tanh(h @ layer['w'])
    >>> def loss_fn(rest, blocks, x, y):
    ...   return jnp.mean((blocks(x) @ rest['head'] - y) ** 2)
    >>> tx = optax_mp.adalomo(0.03)
    >>> step = optax_mp.backward.fused_step(loss_fn, block_fn, tx)
    >>> rest, stack = {'head': jnp.eye(4)}, {'w': jnp.zeros((12, 4, 4))}
    >>> state = step.init(rest, stack)
    >>> train = jax.jit(step, donate_argnums=(0, 1, 2))
    >>> x, y = jnp.ones((8, 4)), jnp.zeros((8, 4))
    >>> for _ in range(50):
    ...   rest, stack, state, loss = train(rest, stack, state, x, y)
    >>> print(f'{loss:.2f}')
    0.00

  **Savings:** all of Adam's state but some vectors, and in ``fused_step`` the
  gradients of all layers but one.

  **Caveats:** a matrix of zeros moves by at most eta * eps2 * d a step, root
  mean square. For a bound on the global norm ``fused_step`` has ``max_norm``.
  Leading axes are batch axes: of a convolution the last two should be its
  channels, as in Flax, but two or more last axes of length 1 do not count,
  those of PyTorch's 1x1 kernels. A stack of vectors (L, n) looks like one
  matrix here, and like L vectors in ``fused_step``: ``matrices`` keeps it out
  of both. Under ``optax.inject_hyperparams``, ``static_args`` are matrices and
  mask.

  References:
    Lv et al., `AdaLomo: Low-memory Optimization with Adaptive Learning Rate
    <https://arxiv.org/abs/2310.10195>`_, 2023
  """
  scale = scale_by_adalomo(decay_rate, clip_threshold, eps1=eps1, eps2=eps2)
  decay = optax.stateless(lambda u, w: _decayed(u, w, weight_decay, eps2))
  tx = _groups.alias(
    optax.chain(scale, decay if mask is None else optax.masked(decay, mask)),
    optax.scale_by_learning_rate(learning_rate),
    matrices,
    _adam.scale_by_adam(),
    _adam.decay_before_step(
      _groups.own(adam_learning_rate, learning_rate), weight_decay, mask
    ),
  )
  return _trees.in_float32(optax.chain(_clipping.prepared(clip_value), tx))


def _normalized(g, nu, row, col, b, eps1):
  """U before it is clipped, and the squares after this step."""
  square = jnp.square(g) + eps1
  if not _is_matrix(g):
    nu = _factored.decay(square, nu, b)
    return g / jnp.sqrt(nu), nu, NOTHING, NOTHING
  square = _factored.squeezed(square)
  row = _factored.decay(jnp.mean(square, axis=-1), row, b)
  col = _factored.decay(jnp.mean(square, axis=-2), col, b)
  u = _factored.normalized(_factored.squeezed(g), row, col)
  return _factored.expanded(u, g), NOTHING, row, col


def _scale(w, eps2):
  """What a step of 1 is relative to."""
  return jnp.maximum(eps2, _factored.rms_of_matrices(w))


def _decayed(updates, params, weight_decay, eps2):
  return jax.tree.map(
    lambda u, w: u + weight_decay * _scale(w, eps2) * w, updates, params
  )


def _is_matrix(p: chex.Array) -> bool:
  return _factored.is_factored(p.shape)


def _check_decay_rate(decay_rate: Any) -> None:
  if isinstance(decay_rate, int | float) and not decay_rate < 0:
    raise ValueError(
      f'`decay_rate` must be below 0; got {decay_rate!r}. The 0.8 of '
      '`optax.adafactor` is -0.8 here.'
    )
