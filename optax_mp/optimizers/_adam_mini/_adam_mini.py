# SPDX-License-Identifier: Apache-2.0
"""AdamW with one second moment for each block of a leaf, by what it is for."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_mp._core import _hyperparams
from optax_mp.formats import _paths
from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _checks
from optax_mp.optimizers._core import _names
from optax_mp.optimizers._core import _subsets
from optax_mp.optimizers._core import _trees

Blocks = _subsets.Blocks
BlockRule = Callable[[str, jax.ShapeDtypeStruct], Blocks]


class ScaleByAdamMiniState(NamedTuple):
  """A momentum in full, and a second moment for each block."""

  count: chex.Array  # (), int32
  mu: optax.Updates  # like the parameters, float32
  nu: optax.Updates  # one for each block, float32


def scale_by_adam_mini(
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  eps: chex.Numeric = 1e-8,
  *,
  blocks: BlockRule,
) -> optax.GradientTransformationExtraArgs:
  """The update of :func:`adam_mini`, without learning rate and decay.

  Args:
    b1: see :func:`adam_mini`.
    b2: see there.
    eps: see there.
    blocks: see there.

  Returns:
    A transformation.

  Raises:
    ValueError: as :func:`adam_mini` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_mp import optimizers
    >>> params = {'mlp': {'kernel': jnp.ones((8, 32)), 'bias': jnp.ones(32)}}
    >>> tx = optimizers.scale_by_adam_mini(
    ...   blocks=lambda path, leaf: optimizers.Blocks((-2,))
    ...   if path.endswith('kernel')
    ...   else optimizers.Blocks()
    ... )
    >>> tx.init(params).nu['mlp']['kernel'].shape
    (32,)
  """
  _checks.decays(b1=b1, b2=b2)
  _checks.positive(eps=eps)

  def init_fn(params):
    mu = jax.tree.map(_trees.zeros, params)
    nu = jax.tree.map(_subsets.zero_moments, params, _ruled(blocks, params))
    return ScaleByAdamMiniState(jnp.zeros((), jnp.int32), mu, nu)

  def update_fn(updates, state, params=None):
    del params
    count = _trees.increment(state.count)
    bias = _adam.bias(count, b1, b2)
    # eps is added after the bias of the root is corrected.
    own = eps * jnp.sqrt(_adam.weight(count, b2))

    def leaf(g, mu, nu, shared):
      mu = b1 * mu + (1 - b1) * g
      nu = b2 * nu + (1 - b2) * _subsets.means(jnp.square(g), shared)
      scale = bias / (jnp.sqrt(nu) + own)
      return mu * _subsets.spread(scale, shared, g), mu, nu

    updates, mu, nu = _trees.map_leaves(
      leaf, updates, (state.mu, state.nu), _ruled(blocks, updates)
    )
    return updates, ScaleByAdamMiniState(count, mu, nu)

  return _trees.in_float32(optax.GradientTransformation(init_fn, update_fn))


@_hyperparams.factory()
def adam_mini(
  learning_rate: optax.ScalarOrSchedule,
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  *,
  blocks: BlockRule,
  eps: chex.Numeric = 1e-8,
  weight_decay: chex.Numeric = 0.0,
  mask: _adam.Mask = None,
) -> optax.GradientTransformationExtraArgs:
  r"""AdamW with one second moment for each block of coordinates.

  **Stored:** the momentum, and one number for each block, in float32: with the
  blocks of :func:`adam_mini_blocks` a little over 4 bytes per parameter. With B
  the blocks of a leaf:

  .. math::
    M &\leftarrow b_1 M + (1 - b_1) G, \quad
      v_B \leftarrow b_2 v_B + (1 - b_2) \mathrm{mean}_{i \in B}(G_i^2) \\
    u_B &= -\eta \lambda W_B - \frac{\eta}{1 - b_1^t}
      \frac{M_B}{\sqrt{v_B / (1 - b_2^t)} + \epsilon}

  Args:
    learning_rate: eta, a number or a schedule; AdamW's.
    b1: decay of the momentum.
    b2: decay of the second moments.
    blocks: a function ``(path, leaf) -> Blocks`` of a path such as
      ``'layer/kernel'`` and a shape, such as :func:`adam_mini_blocks` makes
      for transformers. It has no default: names do not tell how many heads
      there are.
    eps: added to the roots of second moments; larger than 0.
    weight_decay: lambda.
    mask: what to decay, see ``optax.adamw``. None: all but leaves on whose path
      is a norm (``*norm*``, ``ln``, ``ln1``, ``ln_*``, ``*_ln``) or a
      ``*bias*``, as in the official code.

  Returns:
    A transformation.

  Raises:
    ValueError: for a decay outside [0, 1) or an eps of 0; in ``init``, for
      blocks that do not fit a leaf.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_mp
    >>> params = {'query': {'kernel': jnp.ones((512, 512))}}
    >>> blocks = optax_mp.optimizers.adam_mini_blocks(num_heads=8)
    >>> tx = optax_mp.adam_mini(1e-3, blocks=blocks)
    >>> tx.init(params)[0].nu['query']['kernel'].shape
    (8,)

  **Savings:** half of AdamW's state.

  **Caveats:** fewer second moments than blocks of the Hessian matrix are what
  the paper warns of: look at what ``blocks`` gives for your names. The leading
  axes of a stack are kept by all ``Blocks`` that do not name them. Under
  ``optax.inject_hyperparams``, ``static_args`` are blocks and mask.

  References:
    Zhang et al., `Adam-mini: Use Fewer Learning Rates To Gain More
    <https://arxiv.org/abs/2406.16793>`_, 2024
  """
  return _trees.in_float32(
    optax.chain(
      scale_by_adam_mini(b1, b2, eps, blocks=blocks),
      _adam.decay_before_step(
        learning_rate, weight_decay, _decayed if mask is None else mask
      ),
    )
  )


def _ruled(blocks, tree):
  """The tree of blocks, checked."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  in_variables = _paths.are_variables([path for path, _ in leaves])

  def of(path, leaf):
    name = _paths.path_str(path, in_variables)
    chosen = blocks(name, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    _subsets.check_blocks(chosen, leaf.shape, name)
    return chosen

  return jax.tree_util.tree_map_with_path(of, tree)


def _decayed(params):
  def is_decayed(path, _):
    names = _paths.path_str(path).split('/')
    return not _names.has(names, _names.NORM, _names.BIAS)

  return jax.tree_util.tree_map_with_path(is_decayed, params)
