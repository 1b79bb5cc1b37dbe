# SPDX-License-Identifier: Apache-2.0
"""Lion, SGD, Muon and AdEMAMix with momenta in 8 bits."""

from typing import Any

import optax
from optax import contrib

from optax_mp._recipes import _build
from optax_mp.optimizers._core import _mesh


@_build.like(optax.lion, 'b2')
def lion_8bit(
  *args: Any,
  residual_bits: int = 8,
  keep_float32: str | None = None,
  min_size: int = 4096,
  seed: int = 0,
  **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
  """Lion, momentum in 8 bits, parameters in bfloat16 with error feedback.

  The momentum is a ``BlockInt(8)``, rounded stochastically; where b2 < 0.95
  only if it is small.

  Args:
    *args: arguments of ``optax.lion``: ``learning_rate, b1, b2, ...``.
    residual_bits: 16, 8 or 0 bits beside each bfloat16 parameter.
    keep_float32: a regular expression: where it is found in the path of a
      parameter (``'embed'``), momenta stay float32.
    min_size: momenta with fewer values than this stay float32.
    seed: for the stochastic rounding. These four are ``static_args`` under
      ``optax.inject_hyperparams``.
    **kwargs: arguments of ``optax.lion``: ``weight_decay, mask, ...``.

  Returns:
    A transformation for bfloat16 parameters; see :func:`compensated`.

  Raises:
    ValueError: as :func:`compensated` does; for ``mu_dtype``, whose place
      the formats take.

  Examples:
    >>> import jax.numpy as jnp, optax_mp
    >>> params = {'w': jnp.ones((1024, 1024), jnp.bfloat16)}
    >>> plan = optax_mp.memory.plan(optax_mp.lion_8bit(1e-4), params)
    >>> print(f'{plan.bytes_per_param:.2f}')
    6.03

  **Savings:** 4 bytes per parameter and 2 of a bfloat16 gradient; in float32
  Lion takes 12.

  References:
    Chen et al., `Symbolic Discovery of Optimization Algorithms
    <https://arxiv.org/abs/2302.06675>`_, 2023
  """
  b2 = _build.argument(optax.lion, 'b2', args, kwargs)
  rule = {'mu': _build.first_moment(b2)}
  inner = optax.lion(*args, **kwargs)
  return _build.assemble(
    inner, rule, residual_bits, min_size, seed, keep_float32
  )


@_build.like(optax.sgd, 'momentum', momentum=0.9)
def sgdm_8bit(
  *args: Any,
  residual_bits: int = 8,
  keep_float32: str | None = None,
  min_size: int = 4096,
  seed: int = 0,
  **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
  """SGD, momentum in 8 bits, parameters in bfloat16 with error feedback.

  The momentum is a ``BlockInt(8)``, rounded stochastically; where it decays by
  less than 0.95 only if it is small. ``momentum`` is 0.9 unless given.

  Args:
    *args: arguments of ``optax.sgd``: ``learning_rate, momentum, ...``.
    residual_bits: 16, 8 or 0 bits beside each bfloat16 parameter.
    keep_float32: a regular expression: where it is found in the path of a
      parameter (``'embed'``), momenta stay float32.
    min_size: momenta with fewer values than this stay float32.
    seed: for the stochastic rounding. These four are ``static_args`` under
      ``optax.inject_hyperparams``.
    **kwargs: arguments of ``optax.sgd``: ``nesterov, ...``.

  Returns:
    A transformation for bfloat16 parameters; see :func:`compensated`.

  Raises:
    ValueError: as :func:`compensated` does; for ``momentum=None``; for
      ``accumulator_dtype``, whose place the formats take.

  Examples:
    >>> import jax.numpy as jnp, optax_mp
    >>> params = {'w': jnp.ones((1024, 1024), jnp.bfloat16)}
    >>> plan = optax_mp.memory.plan(optax_mp.sgdm_8bit(0.1), params)
    >>> print(f'{plan.bytes_per_param:.2f}')
    6.03

  **Savings:** 4 bytes per parameter and 2 of a bfloat16 gradient; in float32
  SGD with momentum takes 12.

  References:
    Sutskever et al., `On the importance of initialization and momentum
    <https://proceedings.mlr.press/v28/sutskever13.html>`_, 2013
  """
  inner, momentum = _build.sgd_with_momentum(args, kwargs)
  rule = {'trace': _build.first_moment(momentum)}
  return _build.assemble(
    inner, rule, residual_bits, min_size, seed, keep_float32
  )


@_build.like(contrib.muon, 'beta', 'adam_b1')
def muon_8bit(
  *args: Any,
  residual_bits: int = 8,
  keep_float32: str | None = None,
  min_size: int = 4096,
  seed: int = 0,
  **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
  """Muon, momentum in 8 bits, parameters in bfloat16 with error feedback.

  Momenta are ``BlockInt(8)``, rounded stochastically, with a decay below 0.95
  only where they are small. Optax's Muon has an Adam for all but matrices: its
  moments are as in :func:`adamw_8bit`.

  Args:
    *args: arguments of ``contrib.muon``: ``learning_rate, ns_coeffs, ...``.
    residual_bits: 16, 8 or 0 bits beside each bfloat16 parameter.
    keep_float32: a regular expression: where it is found in the path of a
      parameter (``'embed'``), momenta stay float32.
    min_size: momenta with fewer values than this stay float32.
    seed: for the stochastic rounding. These four are ``static_args`` under
      ``optax.inject_hyperparams``.
    **kwargs: arguments of ``contrib.muon``: ``weight_decay, mask, ...``.

  Returns:
    A transformation for bfloat16 parameters; see :func:`compensated`.

  Raises:
    ValueError: as :func:`compensated` does; for ``mu_dtype``, whose place
      the formats take.

  Examples:
    >>> import jax.numpy as jnp, optax_mp
    >>> params = {'w': jnp.ones((1024, 1024), jnp.bfloat16)}
    >>> plan = optax_mp.memory.plan(optax_mp.muon_8bit(1e-3), params)
    >>> print(f'{plan.bytes_per_param:.2f}')
    6.03

  **Savings:** 4 bytes per parameter and 2 of a bfloat16 gradient; in float32
  Muon takes 12.

  References:
    Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024;
    `Effective Quantization of Muon Optimizer States
    <https://arxiv.org/abs/2509.23106>`_, 2025
  """
  beta, adam_b1 = (
    _build.argument(contrib.muon, name, args, kwargs)
    for name in ('beta', 'adam_b1')
  )
  of_muon = _build.first_moment(beta)
  of_adam = _build.divided_first_moment(adam_b1)

  def momentum(path, leaf):
    del leaf
    return of_adam if 'inner_states/adam/' in path else of_muon

  rule = {'mu': momentum, 'nu': _build.second_moment()}
  # On explicit axes JAX asks how products of a momentum with itself are cut.
  inner = _mesh.automatic_update(contrib.muon(*args, **kwargs))
  return _build.assemble(
    inner, rule, residual_bits, min_size, seed, keep_float32
  )


@_build.like(contrib.ademamix, 'b1', 'b3')
def ademamix_8bit(
  *args: Any,
  residual_bits: int = 8,
  keep_float32: str | None = None,
  min_size: int = 4096,
  seed: int = 0,
  **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
  """AdEMAMix, moments in 8 bits, parameters in bfloat16 with error feedback.

  The fast average and the second moment are as in :func:`adamw_8bit`, the slow
  one is a ``BlockInt(8)``. Averages with a decay of 0.95 or more are rounded
  stochastically, others only where they are small, and would stand still.

  Args:
    *args: arguments of ``contrib.ademamix``: ``learning_rate, b1, b2, ...``.
    residual_bits: 16, 8 or 0 bits beside each bfloat16 parameter.
    keep_float32: a regular expression: where it is found in the path of a
      parameter (``'embed'``), moments stay float32.
    min_size: moments with fewer values than this stay float32.
    seed: for the stochastic rounding. These four are ``static_args`` under
      ``optax.inject_hyperparams``.
    **kwargs: arguments of ``contrib.ademamix``: ``weight_decay, mask, ...``.

  Returns:
    A transformation for bfloat16 parameters; see :func:`compensated`.

  Raises:
    ValueError: as :func:`compensated` does; for ``mu_dtype``, whose place
      the formats take.

  Examples:
    >>> import jax.numpy as jnp, optax_mp
    >>> params = {'w': jnp.ones((1024, 1024), jnp.bfloat16)}
    >>> plan = optax_mp.memory.plan(optax_mp.ademamix_8bit(1e-3), params)
    >>> print(f'{plan.bytes_per_param:.2f}')
    8.09

  **Savings:** 6 bytes per parameter and 2 of a bfloat16 gradient; in float32
  AdEMAMix takes 20.

  References:
    Pagliardini et al., `The AdEMAMix Optimizer: Better, Faster, Older
    <https://arxiv.org/abs/2409.03137>`_, 2024
  """
  b1, b3 = (
    _build.argument(contrib.ademamix, name, args, kwargs)
    for name in ('b1', 'b3')
  )
  rule = {
    'm1': _build.divided_first_moment(b1),
    'm2': _build.divided_first_moment(b3),
    'nu': _build.second_moment(),
  }
  inner = contrib.ademamix(*args, **kwargs)
  return _build.assemble(
    inner, rule, residual_bits, min_size, seed, keep_float32
  )
