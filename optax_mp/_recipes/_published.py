# SPDX-License-Identifier: Apache-2.0
"""AdamW with moments in the formats of COAT and FlashOptim."""

from typing import Any

import optax

from optax_mp import formats
from optax_mp._recipes import _build


@_build.like(optax.adamw, 'b1')
def coat_adamw(
  *args: Any,
  residual_bits: int = 8,
  keep_float32: str | None = None,
  min_size: int = 4096,
  seed: int = 0,
  **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
  """AdamW, moments in fp8 with dynamic range expansion.

  Both moments are ``Float8('e4m3')``, COAT's format for optimizer states; the
  second one is rounded stochastically, so that it follows gradients that
  shrink, as is the first where b1 is 0.95 or more. Neither becomes zero.

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
    >>> plan = optax_mp.memory.plan(optax_mp.coat_adamw(1e-3), params)
    >>> print(f'{plan.bytes_per_param:.2f}')
    7.06

  **Savings:** 5 bytes per parameter and 2 of a bfloat16 gradient; in float32
  AdamW takes 16.

  References:
    Xi et al., `COAT <https://arxiv.org/abs/2410.19313>`_, 2024
  """
  b1 = _build.argument(optax.adamw, 'b1', args, kwargs)
  rule = {
    'mu': formats.Float8(
      rounding='nearest' if _build.is_fast(b1) else 'stochastic'
    ),
    'nu': formats.Float8(rounding='stochastic', signed=False),
  }
  inner = optax.adamw(*args, **kwargs)
  return _build.assemble(
    inner, rule, residual_bits, min_size, seed, keep_float32
  )


@_build.like(optax.adamw, 'b1')
def flash_adamw(
  *args: Any,
  residual_bits: int = 8,
  keep_float32: str | None = None,
  min_size: int = 4096,
  seed: int = 0,
  **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
  """AdamW, moments in FlashOptim's 8-bit formats.

  The first moment is a ``BlockInt(8, map='softsign', block_size=32)``, the
  second one a ``BlockInt(8, signed=False, map='sqrt', block_size=32)``. Beyond
  FlashOptim, scales are float32 (its float16 ones lose gradients below 1e-6),
  the second moment is rounded stochastically and never becomes zero, and the
  first one is where it would stand still.

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
    >>> plan = optax_mp.memory.plan(optax_mp.flash_adamw(1e-3), params)
    >>> print(f'{plan.bytes_per_param:.2f}')
    7.25

  **Savings:** 5.25 bytes per parameter and 2 of a bfloat16 gradient; in float32
  AdamW takes 16.

  **Caveats:** on a TPU the update copies moments in float32, more than it saves
  where a leaf is large: a tile has 128 columns, and a block 32. There, and for
  the smaller error, take :func:`adamw_8bit`.

  References:
    `FlashOptim <https://arxiv.org/abs/2602.23349>`_, 2026
  """
  b1 = _build.argument(optax.adamw, 'b1', args, kwargs)
  rule = {
    'mu': _build.first_moment(b1, map='softsign', block_size=32),
    'nu': _build.second_moment(map='sqrt', block_size=32),
  }
  inner = optax.adamw(*args, **kwargs)
  return _build.assemble(
    inner, rule, residual_bits, min_size, seed, keep_float32
  )
