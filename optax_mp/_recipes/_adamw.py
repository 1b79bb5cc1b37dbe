# SPDX-License-Identifier: Apache-2.0
"""AdamW with moments in 8 and 4 bits."""

from typing import Any

import optax

from optax_mp import formats
from optax_mp._recipes import _build

_FOUR_BITS = formats.BlockInt(4, map='softsign', rounding='stochastic')


@_build.like(optax.adamw, 'b1')
def adamw_8bit(
  *args: Any,
  residual_bits: int = 8,
  keep_float32: str | None = None,
  min_size: int = 4096,
  seed: int = 0,
  **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
  """AdamW, moments in 8 bits, parameters in bfloat16 with error feedback.

  The first moment is a ``BlockInt(8, map='sqrt_log')``, with square-root
  companding, the second one a ``BlockInt(8, signed=False)``: logarithmic, zero
  only if it is zero, and rounded stochastically, so that it follows gradients
  that shrink. So are first moments, if b1 is less than 0.95 only the small ones
  of a block, which would stand still. Of others the nearer code is taken, a
  smaller error as long as gradients have noise; without any, they stop five
  codes short with b1 = 0.9. With a larger b1 the map is 'sqrt'.

  Args:
    *args: arguments of ``optax.adamw``: ``learning_rate, b1, b2, ...``.
    residual_bits: 16, 8 or 0 bits beside each bfloat16 parameter.
    keep_float32: a regular expression: where it is found in the path of a
      parameter (``'embed'``), moments stay float32.
    min_size: moments with fewer values than this stay float32.
    seed: for the stochastic rounding. These four are ``static_args`` under
      ``optax.inject_hyperparams``.
    **kwargs: arguments of ``optax.adamw``: ``weight_decay, mask, ...``.

  Returns:
    A transformation for bfloat16 parameters; see :func:`compensated`.

  Raises:
    ValueError: as :func:`compensated` does; for ``mu_dtype``, whose place
      the formats take.

  Examples:
    >>> import jax.numpy as jnp, optax_mp
    >>> params = {'w': jnp.ones((1024, 1024), jnp.bfloat16)}
    >>> plan = optax_mp.memory.plan(optax_mp.adamw_8bit(1e-3), params)
    >>> print(f'{plan.bytes_per_param:.2f}')
    7.06

  **Savings:** 5 bytes per parameter and 2 of a bfloat16 gradient; in float32
  AdamW takes 16.

  **Caveats:** XLA:GPU keeps the second moment of an array of more than about
  1.6e9 values in float32 while it updates it, 4 bytes for each of its values
  (``tests/budgets.toml``); of two arrays, it does not. Under ``vmap`` all
  members have the same noise. A ``b1`` that ``optax.inject_hyperparams`` traces
  may have any value, so all of the first moment is then rounded stochastically:
  name it in ``static_args``. With b2 above 0.999 and gradients with little
  noise the largest second moments of a block may be much too small: draws are
  even over steps, and grids that change for some steps meet few of them; nor do
  gradients that come every so many steps, such as 55 or 89. First moments with
  a b1 of 0.95 or more have no code between zero and 1 / 127^2 of the largest of
  their block: beside it, much smaller ones take steps of many learning rates.

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2022
  """
  b1 = _build.argument(optax.adamw, 'b1', args, kwargs)
  rule = {
    'mu': _build.divided_first_moment(b1),
    'nu': _build.second_moment(),
  }
  inner = optax.adamw(*args, **kwargs)
  return _build.assemble(
    inner, rule, residual_bits, min_size, seed, keep_float32
  )


@_build.like(optax.adamw)
def adamw_4bit(
  *args: Any,
  residual_bits: int = 8,
  keep_float32: str | None = None,
  min_size: int = 4096,
  seed: int = 0,
  **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
  """AdamW, moments in 4 bits, parameters in bfloat16 with error feedback.

  The first moment is a ``BlockInt(4, map='softsign')``, the second one a
  logarithmic ``BlockInt(4, signed=False)``, both rounded stochastically.

  Args:
    *args: arguments of ``optax.adamw``: ``learning_rate, b1, b2, ...``.
    residual_bits: 16, 8 or 0 bits beside each bfloat16 parameter.
    keep_float32: a regular expression: where it is found in the path of a
      parameter (``'embed'``), moments stay float32.
    min_size: moments with fewer values than this stay float32.
    seed: for the stochastic rounding. These four are ``static_args`` under
      ``optax.inject_hyperparams``.
    **kwargs: arguments of ``optax.adamw``: ``weight_decay, mask, ...``.

  Returns:
    A transformation for bfloat16 parameters; see :func:`compensated`.

  Raises:
    ValueError: as :func:`compensated` does; for ``mu_dtype``, whose place
      the formats take.

  Examples:
    >>> import jax.numpy as jnp, optax_mp
    >>> params = {'w': jnp.ones((1024, 1024), jnp.bfloat16)}
    >>> plan = optax_mp.memory.plan(optax_mp.adamw_4bit(1e-3), params)
    >>> print(f'{plan.bytes_per_param:.2f}')
    6.06

  **Savings:** 4 bytes per parameter and 2 of a bfloat16 gradient; in float32
  AdamW takes 16.

  **Caveats:** sixteen codes are few: updates are an order of magnitude farther
  from those of float32 than with :func:`adamw_8bit`, which takes one byte more
  and has the same caveats. A first moment below 1/13 of the largest of its
  block is stored as zero or as that: right on average, but where gradients of
  one block differ a hundredfold, the smaller ones take steps of many learning
  rates, which float32 does not. ``keep_float32`` is for such parameters.

  References:
    Li et al., `Memory Efficient Optimizers with 4-bit States
    <https://arxiv.org/abs/2309.01507>`_, 2023
  """
  rule = {'mu': _FOUR_BITS, 'nu': _build.second_moment(4)}
  inner = optax.adamw(*args, **kwargs)
  return _build.assemble(
    inner, rule, residual_bits, min_size, seed, keep_float32
  )


@_build.like(optax.adamw)
def adamw_4bit_factored(
  *args: Any,
  residual_bits: int = 8,
  keep_float32: str | None = None,
  min_size: int = 4096,
  seed: int = 0,
  **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
  """AdamW, the first moment in 4 bits, the second one in two vectors.

  The first moment is that of :func:`adamw_4bit`; second moments of matrices are
  kept as ``Factored()``, of vectors as there.

  Args:
    *args: arguments of ``optax.adamw``: ``learning_rate, b1, b2, ...``.
    residual_bits: 16, 8 or 0 bits beside each bfloat16 parameter.
    keep_float32: a regular expression: where it is found in the path of a
      parameter (``'embed'``), moments stay float32.
    min_size: moments with fewer values than this stay float32.
    seed: for the stochastic rounding. These four are ``static_args`` under
      ``optax.inject_hyperparams``.
    **kwargs: arguments of ``optax.adamw``: ``weight_decay, mask, ...``.

  Returns:
    A transformation for bfloat16 parameters; see :func:`compensated`.

  Raises:
    ValueError: as :func:`compensated` does; for ``mu_dtype``, whose place
      the formats take.

  Examples:
    >>> import jax.numpy as jnp, optax_mp
    >>> params = {'w': jnp.ones((1024, 1024), jnp.bfloat16)}
    >>> plan = optax_mp.memory.plan(optax_mp.adamw_4bit_factored(1e-3), params)
    >>> print(f'{plan.bytes_per_param:.2f}')
    5.54

  **Savings:** 3.5 bytes per parameter and 2 of a bfloat16 gradient; in float32
  AdamW takes 16.

  **Caveats:** a second moment of two vectors is another optimizer, with a loss
  of its own: above that of AdamW by several standard errors, where the other
  recipes are within one or so (``benchmarks/README.md``).

  References:
    Li et al., `Memory Efficient Optimizers with 4-bit States
    <https://arxiv.org/abs/2309.01507>`_, 2023 (their 4-bit Factor)
  """

  def second_moment(path, leaf):
    del path
    few_axes = len(leaf.shape) < 2
    return _build.second_moment(4) if few_axes else formats.Factored()

  rule = {'mu': _FOUR_BITS, 'nu': second_moment}
  inner = optax.adamw(*args, **kwargs)
  return _build.assemble(
    inner, rule, residual_bits, min_size, seed, keep_float32
  )
