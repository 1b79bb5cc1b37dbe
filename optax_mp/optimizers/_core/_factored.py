# SPDX-License-Identifier: Apache-2.0
"""Second moments as rows times columns: what Adafactor's descendants share."""

from collections.abc import Callable
import math
from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp
import optax

from optax_mp.optimizers._core import _trees


def decay(x: chex.Array, average: chex.Array, b: chex.Numeric) -> chex.Array:
  """The moving average after one more value: ``b average + (1 - b) x``."""
  return b * average + (1 - b) * x


def normalized(g: chex.Array, row: chex.Array, col: chex.Array) -> chex.Array:
  r"""The gradient divided by the root of rows times columns over their mean.

  .. math::
    U_{ij} = g_{ij} r_i^{-1/2} c_j^{-1/2} \mathrm{mean}(r)^{1/2}

  In this order. The usual quotient r / mean(r) of a row that was zero
  underflows beside a gradient of 1e4, and XLA then has 0 * inf = NaN.

  Args:
    g: (..., m, n).
    row: (..., m), means or sums along rows; positive.
    col: (..., n), means or sums along columns; positive.

  Returns:
    An array like ``g``. For sums, ``mean(r)`` is to be their sum: multiply by
    ``sqrt(m)``.
  """
  mean = jnp.mean(row, axis=-1)[..., None, None]
  u = g * lax.rsqrt(row)[..., None]
  u = u * lax.rsqrt(col)[..., None, :]
  return u * jnp.sqrt(mean)


def rms(x: chex.Array) -> chex.Array:
  """The root of the mean square of all of x, a scalar."""
  return jnp.sqrt(jnp.mean(jnp.square(x))) if x.size else jnp.zeros(())


def rms_of_matrices(x: chex.Array) -> chex.Array:
  """The root mean square of each matrix of a stack, or of a whole vector.

  Args:
    x: any shape; what :func:`trailing_ones` counts is no axis.

  Returns:
    An array that broadcasts against ``x``.
  """
  if not is_factored(x.shape):
    return rms(x)
  last = x.ndim - trailing_ones(x.shape)
  square = jnp.mean(jnp.square(x), axis=(last - 2, last - 1), keepdims=True)
  return jnp.sqrt(square)


def clip_by_rms(
  u: chex.Array, threshold: chex.Numeric, per_slice: bool = False
) -> chex.Array:
  """``u / max(1, RMS(u) / threshold)``, of all or of each matrix of a stack."""
  size = rms_of_matrices(u) if per_slice else rms(u)
  return u / jnp.maximum(1.0, size / threshold)


def zeros(
  params: optax.Params, is_matrix: Callable[[chex.Array], bool]
) -> tuple[Any, Any, Any]:
  """Float32 zeros for moments that matrices have as rows and columns.

  Args:
    params: the parameters.
    is_matrix: which leaves those are.

  Returns:
    A tree of whole moments, for the other leaves; and trees of rows, (..., m),
    and of columns, (..., n), sharded like the axes of the parameters.
  """

  def last(p):
    return p.ndim - trailing_ones(p.shape) - 1

  def rows(p):
    return _trees.zeros_along(p, range(last(p)))

  def cols(p):
    return _trees.zeros_along(p, [*range(last(p) - 1), last(p)])

  def tree(make, wanted):
    return jax.tree.map(
      lambda p: make(p) if is_matrix(p) is wanted else _trees.NOTHING, params
    )

  return tree(_trees.zeros, False), tree(rows, True), tree(cols, True)


def is_factored(shape: tuple[int, ...], min_dim_size: int = 1) -> bool:
  """True for two or more axes, the last two of at least ``min_dim_size``."""
  if len(shape) < 2 or not math.prod(shape):
    return False
  shape = shape[: len(shape) - trailing_ones(shape)]
  return min(shape[-2:]) >= min_dim_size


def trailing_ones(shape: tuple[int, ...]) -> int:
  """How many last axes are those of a 1x1 kernel, in PyTorch's order.

  (out, in, 1, 1) is the matrix (out, in). A single axis of length 1 is no
  kernel: (L, m, 1) are L matrices.
  """
  count = 0
  while count < len(shape) - 2 and shape[-1 - count] == 1:
    count += 1
  return count if count > 1 else 0


def squeezed(x: chex.Array) -> chex.Array:
  """``x`` without the axes that :func:`trailing_ones` counts."""
  return lax.squeeze(x, range(x.ndim - trailing_ones(x.shape), x.ndim))


def expanded(x: chex.Array, like: chex.Array) -> chex.Array:
  """``x`` with the axes again that ``like`` has and was squeezed of."""
  return lax.expand_dims(x, range(x.ndim, like.ndim))
