# SPDX-License-Identifier: Apache-2.0
"""LOMO: Full Parameter Fine-tuning with Limited Resources (2306.09782).

Gradient descent without a state, for the step inside the backward pass.
"""

import chex
import optax

from optax_mp._core import _hyperparams
from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _clipping
from optax_mp.optimizers._core import _groups
from optax_mp.optimizers._core import _trees


@_hyperparams.factory()
def lomo(
  learning_rate: optax.ScalarOrSchedule,
  clip_value: chex.Numeric | None = None,
  weight_decay: chex.Numeric = 0.0,
  *,
  mask: _adam.Mask = None,
  matrices: _groups.Matrices = None,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Gradient descent, computed in float32, to be run in the backward pass.

  **Stored:** nothing, 0 bytes per parameter.

  .. math::
    g = k \cdot \min(\max(G / s, -v), v), \quad
    u = -\eta g - \eta \lambda W

  That is ``optax.sgd``. What LOMO saves is the gradients, each used as soon as
  it is there: :func:`backward.fused_step` does that, here for twelve layers.

  Args:
    learning_rate: eta, a number or a schedule. The authors' example has 0.03
      with a norm of at most 1.
    clip_value: v; None: no such clip.
    weight_decay: lambda.
    mask: what to decay, see ``optax.adamw``.
    matrices: a tree of bools, or a function from parameters to one such as
      :func:`hidden_matrices`: what LOMO is for; the rest gets AdamW, moments in
      float32. None: all leaves, as in the official code.
    adam_learning_rate: for that rest, if not ``learning_rate``.

  Returns:
    A transformation. Its ``update`` takes two more arguments, by name:
    ``loss_scale``, s, what the loss was multiplied by; and ``clip_coef``, k,
    for a global norm of at most ``x``, which the official code takes in a
    backward pass of its own before it clips any value:
    ``jnp.minimum(1.0, x / (optax.tree.norm(gradients) + 1e-6))``.

  Raises:
    ValueError: for a ``clip_value`` of 0 or less.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_mp
    >>> def block_fn(layer, h):
    ...   return h + jnp.tanh(h @ layer['w'])
    >>> def loss_fn(rest, blocks, x, y):
    ...   return jnp.mean((blocks(x) @ rest['head'] - y) ** 2)
    >>> step = optax_mp.backward.fused_step(
    ...   loss_fn, block_fn, optax_mp.lomo(0.1), max_norm=1.0
    ... )
    >>> rest, stack = {'head': jnp.eye(4)}, {'w': jnp.zeros((12, 4, 4))}
    >>> state = step.init(rest, stack)
    >>> train = jax.jit(step, donate_argnums=(0, 1, 2))
    >>> x, y = jnp.ones((8, 4)), jnp.zeros((8, 4))
    >>> for _ in range(50):
    ...   rest, stack, state, loss = train(rest, stack, state, x, y)
    >>> print(f'{loss:.2f}')
    0.00

  **Savings:** all of Adam's state, and in ``fused_step`` the gradients.

  **Caveats:** it does not adapt to a gradient's size: without a bound on the
  norm, and a warm-up, it needs a small learning rate; see :func:`adalomo`.
  ``fused_step`` has arguments of its own for the norm, two passes or the last
  step's, and for float16's scale: leave ``loss_scale`` and ``clip_coef`` to
  it. It multiplies by ``x / norm`` where the norm is larger, a millionth more
  than the official coefficient, and clips the norm before values. There is
  nothing that :func:`compressed` could store, which is an error there. Under
  ``optax.inject_hyperparams``, ``static_args`` are matrices and mask.

  References:
    Lv et al., `Full Parameter Fine-tuning for Large Language Models with
    Limited Resources <https://arxiv.org/abs/2306.09782>`_, 2023
  """
  tx = _groups.with_rates(
    optax.identity(),
    _adam.scale_by_adam(),
    _adam.decay_before_step,
    (learning_rate, adam_learning_rate),
    (weight_decay, mask),
    matrices,
  )
  return _trees.in_float32(optax.chain(_clipping.prepared(clip_value), tx))
