# SPDX-License-Identifier: Apache-2.0
"""Parameters and moments in bfloat16, the errors of both fed back."""

from typing import Any

import optax

from optax_mp import formats
from optax_mp._recipes import _build

_like = _build.like


def _in_bfloat16(inner, residual_bits: int, min_size: int, seed: int):
  rule = formats.Split(8)
  return _build.assemble(inner, rule, residual_bits, min_size, seed)


@_like(optax.adamw)
def adamw_bf16(
  *args: Any,
  residual_bits: int = 16,
  min_size: int = 4096,
  seed: int = 0,
  **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
  """AdamW, parameters and moments in bfloat16 with error feedback.

  ``compensated(compressed(optax.adamw(...), Split(8)), residual_bits)``: each
  moment is a bfloat16 and 8 bits of error feedback.

  Args:
    *args: arguments of ``optax.adamw``: ``learning_rate, b1, b2, ...``.
    residual_bits: 16, 8 or 0 bits beside each bfloat16 parameter.
    min_size: moments with fewer values than this stay float32.
    seed: for the stochastic rounding of 8 and 0 residual bits. These three are
      ``static_args`` under ``optax.inject_hyperparams``.
    **kwargs: arguments of ``optax.adamw``: ``weight_decay, mask, ...``.

  Returns:
    A transformation for bfloat16 parameters; see :func:`compensated`.

  Raises:
    ValueError: as :func:`compensated` does; for ``mu_dtype``, whose place the
      format takes.

  Examples:
    >>> import jax.numpy as jnp, optax_mp
    >>> params = {'w': jnp.ones((256, 256), jnp.bfloat16)}
    >>> tx = optax_mp.adamw_bf16(1e-3, weight_decay=0.01)
    >>> print(f'{optax_mp.memory.plan(tx, params).bytes_per_param:.1f}')
    12.0

  **Savings:** 12 bytes per parameter with a bfloat16 gradient, 11 or 10 with 8
  or 0 residual bits; in float32 AdamW takes 16.

  References:
    Loshchilov and Hutter, `Decoupled Weight Decay Regularization
    <https://arxiv.org/abs/1711.05101>`_, 2019
  """
  inner = optax.adamw(*args, **kwargs)
  return _in_bfloat16(inner, residual_bits, min_size, seed)


@_like(optax.sgd, momentum=0.9)
def sgdm_bf16(
  *args: Any,
  residual_bits: int = 16,
  min_size: int = 4096,
  seed: int = 0,
  **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
  """SGD with momentum, parameters and momentum in bfloat16 with error feedback.

  Args:
    *args: arguments of ``optax.sgd``: ``learning_rate, momentum, ...``;
      ``momentum`` is 0.9 unless given.
    residual_bits: 16, 8 or 0 bits beside each bfloat16 parameter.
    min_size: momenta with fewer values than this stay float32.
    seed: for the stochastic rounding of 8 and 0 residual bits. These three are
      ``static_args`` under ``optax.inject_hyperparams``.
    **kwargs: arguments of ``optax.sgd``: ``nesterov, ...``.

  Returns:
    A transformation for bfloat16 parameters; see :func:`compensated`.

  Raises:
    ValueError: as :func:`compensated` does; for ``momentum=None``, which leaves
      no state to compress, and for ``accumulator_dtype``.

  Examples:
    >>> import jax.numpy as jnp, optax_mp
    >>> params = {'w': jnp.ones((256, 256), jnp.bfloat16)}
    >>> plan = optax_mp.memory.plan(optax_mp.sgdm_bf16(0.1), params)
    >>> print(f'{plan.bytes_per_param:.1f}')
    9.0

  **Savings:** 9 bytes per parameter with a bfloat16 gradient, in float32 12.

  References:
    Sutskever et al., `On the importance of initialization and momentum
    <https://proceedings.mlr.press/v28/sutskever13.html>`_, 2013
  """
  inner, _ = _build.sgd_with_momentum(args, kwargs)
  return _in_bfloat16(inner, residual_bits, min_size, seed)


@_like(optax.lion)
def lion_bf16(
  *args: Any,
  residual_bits: int = 16,
  min_size: int = 4096,
  seed: int = 0,
  **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
  """Lion with parameters and momentum in bfloat16 with error feedback.

  Args:
    *args: arguments of ``optax.lion``: ``learning_rate, b1, b2, ...``.
    residual_bits: 16, 8 or 0 bits beside each bfloat16 parameter.
    min_size: momenta with fewer values than this stay float32.
    seed: for the stochastic rounding of 8 and 0 residual bits. These three are
      ``static_args`` under ``optax.inject_hyperparams``.
    **kwargs: arguments of ``optax.lion``: ``weight_decay, mask, ...``.

  Returns:
    A transformation for bfloat16 parameters; see :func:`compensated`.

  Raises:
    ValueError: as :func:`compensated` does; for ``mu_dtype``, whose place the
      format takes.

  Examples:
    >>> import jax.numpy as jnp, optax_mp
    >>> params = {'w': jnp.ones((256, 256), jnp.bfloat16)}
    >>> plan = optax_mp.memory.plan(optax_mp.lion_bf16(1e-4), params)
    >>> print(f'{plan.bytes_per_param:.1f}')
    9.0

  **Savings:** 9 bytes per parameter with a bfloat16 gradient, in float32 12.

  References:
    Chen et al., `Symbolic Discovery of Optimization Algorithms
    <https://arxiv.org/abs/2302.06675>`_, 2023
  """
  inner = optax.lion(*args, **kwargs)
  return _in_bfloat16(inner, residual_bits, min_size, seed)
