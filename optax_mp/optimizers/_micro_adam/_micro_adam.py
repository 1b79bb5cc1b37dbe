# SPDX-License-Identifier: Apache-2.0
"""MicroAdam: low space overhead and provable convergence (2405.15593).

Adam from the last few gradients, of which only the largest entries are kept;
what was left out of them is fed back.
"""

import functools
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_mp import formats
from optax_mp._core import _hyperparams
from optax_mp.formats import _containers
from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _checks
from optax_mp.optimizers._core import _groups
from optax_mp.optimizers._core import _mesh
from optax_mp.optimizers._core import _trees
from optax_mp.optimizers._micro_adam import _sparse
from optax_mp.optimizers._micro_adam import _window

RESIDUAL = formats.Affine(4, 64)


class ScaleByMicroAdamState(NamedTuple):
  """The largest entries of the last gradients, and the rest of all of them.

  A leaf is (..., blocks, block) and, if they do not cover it, one block more,
  shorter, whose state has names of its own. A single block has no axis.
  """

  count: chex.Array  # (), int32
  indices: Any  # (..., blocks, window k), int16: within the block
  values: Any  # the same, bfloat16
  residual: Any  # (..., blocks, block) in a format: what was not selected
  last_indices: Any  # (..., window k), int16
  last_values: Any  # the same, bfloat16
  last_residual: Any  # (..., block) in a format


def scale_by_micro_adam(
  window: int = 10,
  density: float = 0.01,
  *,
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  eps: chex.Numeric = 1e-8,
  block_size: int = 16384,
  residual: formats.Format = RESIDUAL,
  values_dtype: Literal['bfloat16', 'float32'] = 'bfloat16',
  layout: Literal['flat', 'last_axis'] = 'flat',
  alpha: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
  """The update of :func:`micro_adam`, without its learning rate.

  Args:
    window: for this and all others see :func:`micro_adam`.
    density: share of entries that are kept.
    b1: decay of the first moment.
    b2: decay of the second.
    eps: added to the root of the second.
    block_size: values among which the largest are found.
    residual: the format of what is left out.
    values_dtype: of what is kept.
    layout: what blocks are blocks of.
    alpha: of the error that goes into the step at once.

  Returns:
    A transformation.

  Raises:
    ValueError: as :func:`micro_adam` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_mp import optimizers
    >>> params = {'w': jnp.ones((256, 256))}
    >>> state = optimizers.scale_by_micro_adam().init(params)
    >>> state.indices['w'].shape, state.residual['w'].codes.shape
    ((4, 1640), (4, 16384))
  """
  _checks.decays(b1=b1, b2=b2)
  _checks.positive(eps=eps)
  method = _sparse.Method(
    window, density, block_size, residual, values_dtype, layout, alpha
  )
  method.check()
  stored = method.stored()

  def init_fn(params):
    fields = (
      jax.tree.map(functools.partial(method.init, field=i), params)
      for i in range(6)
    )
    return ScaleByMicroAdamState(jnp.zeros((), jnp.int32), *fields)

  def update_fn(updates, state, params=None):
    del params
    count = _trees.increment(state.count)
    moments = _window.Moments.at(state.count, count, window, b1, b2, eps)

    def leaf(g, *given):
      if not g.size:
        return g, *given
      run = functools.partial(method.update, shape=g.shape)
      state = [_containers.as_stored(part, stored) for part in given]
      treedef = jax.tree.structure(state)
      axes = [tuple(range(g.ndim)), *method.axes(g, state)]
      out = _mesh.automatic(run, g, state, moments, like=g, axes=axes)
      new = jax.tree.unflatten(treedef, out[1:])
      pairs = zip(new, given, strict=True)
      return out[0], *(_containers.contained(x, old) for x, old in pairs)

    updates, *fields = _trees.map_leaves(leaf, updates, state[1:])
    return updates, ScaleByMicroAdamState(count, *fields)

  return _trees.in_float32(optax.GradientTransformation(init_fn, update_fn))


@_hyperparams.factory('alpha')
def micro_adam(
  learning_rate: optax.ScalarOrSchedule,
  window: int = 10,
  density: float = 0.01,
  *,
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  eps: chex.Numeric = 1e-8,
  block_size: int = 16384,
  residual: formats.Format = RESIDUAL,
  values_dtype: Literal['bfloat16', 'float32'] = 'bfloat16',
  layout: Literal['flat', 'last_axis'] = 'flat',
  alpha: float = 0.0,
  weight_decay: chex.Numeric = 0.0,
  mask: _adam.Mask = None,
  matrices: _groups.Matrices = None,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adam from the last few gradients, of which the largest entries are kept.

  **Stored:** of each block of B values and each of the last ``window`` steps
  k = ceil(density B) indices in int16 and values in bfloat16, and an error of
  4 bits per value with 4 bytes a bucket of 64: 0.96 bytes per parameter, 0.9
  and 4/64. At step t, for each block, with a one-hot e_i for each entry i

  .. math::
    a &= G + E, \quad S_t = \text{the k largest } |a_i|, \quad
      V_t = \sum_{i \in S_t} a_i e_i, \quad E \leftarrow a - V_t \\
    z_1 &= \sum_{s < \min(t, w)} b_1^s V_{t-s}, \quad
      z_2 = \sum_{s < \min(t, w)} b_2^s V_{t-s}^2 \\
    u &= -\eta\, \frac{(1 - b_1) z_1 / (1 - b_1^t)}
      {\sqrt{(1 - b_2) z_2 / (1 - b_2^t)} + \epsilon} - \eta \lambda W

  and E is kept in a format. What was never selected in the window stays.

  Args:
    learning_rate: eta, a number or a schedule.
    window: w, how many gradients there are.
    density: of each, from 0 to 1.
    b1: decay of the first moment.
    b2: decay of the second.
    eps: added to its root, larger than 0.
    block_size: B, below 2^15. Blocks are of consecutive values; the last one is
      shorter. The authors' depends on the GPU.
    residual: a format with signs that rounds to nearest, for E;
      ``Affine(4, 64)``.
    values_dtype: of what is kept; with ``'float32'`` it is exact.
    layout: ``'flat'``: blocks of a matrix as it lies in memory, row by row; or
      ``'last_axis'``: of rows, for leaves that are sharded along other axes,
      whose state then lies where they lie.
    alpha: 0 <= alpha < 1: so much of E is added to the quotient, and taken
      from E, at once.
    weight_decay: lambda.
    mask: what to decay, see ``optax.adamw``.
    matrices: a tree of bools, or a function from parameters to one such as
      :func:`hidden_matrices`: what MicroAdam is for; the rest gets AdamW,
      moments in float32. None: all leaves, as in the official code.
    adam_learning_rate: for that rest, if not ``learning_rate``.

  Returns:
    A transformation.

  Raises:
    ValueError: for a window, block or density that cannot be, a format without
      signs or with noise, a decay outside [0, 1) or an eps of 0.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_mp
    >>> params = {'w': jnp.ones((4096, 4096), jnp.bfloat16)}
    >>> tx = optax_mp.micro_adam(4e-5)
    >>> plan = optax_mp.memory.plan(tx, params, gradients=None)
    >>> print(f'{plan.bytes_per_param - 2:.3f}')
    0.963

  **Savings:** an eighth of Adam's state. A step works on half a million values
  at a time; beside that it needs the gradient in float32, 4 bytes for each
  parameter of a leaf, on TPUs up to 9, and more where the number of blocks, a
  prime for example, makes no equal chunks.

  **Caveats:** the exponents of the corrections are t, however short the window
  is, so steps grow: of a constant gradient that is always selected u is eta
  until the window is full, 5.2 eta after 1000 steps and 6.5 eta in the end, and
  an entry selected in the newest gradient alone moves by up to 3.2 eta. Tune
  the learning rate for long runs. Of equal magnitudes the first is selected.
  What float32 values lose in bfloat16 is not fed back. A stack of vectors
  (L, n) is a matrix here, cut like any other with ``layout='flat'``.
  ``compressed`` takes a state with ``values_dtype='float32'`` only. Under
  ``optax.inject_hyperparams``, ``static_args`` are window, density, block_size,
  alpha, matrices and mask.

  References:
    Modoranu et al., `MicroAdam: Accurate Adaptive Optimization with Low Space
    Overhead and Provable Convergence <https://arxiv.org/abs/2405.15593>`_, 2024
  """
  method = scale_by_micro_adam(
    window,
    density,
    b1=b1,
    b2=b2,
    eps=eps,
    block_size=block_size,
    residual=residual,
    values_dtype=values_dtype,
    layout=layout,
    alpha=alpha,
  )
  return _groups.with_rates(
    method,
    _adam.scale_by_adam(b1, b2, eps),
    _adam.decay_before_step,
    (learning_rate, adam_learning_rate),
    (weight_decay, mask),
    matrices,
  )
