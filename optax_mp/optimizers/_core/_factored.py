# SPDX-License-Identifier: Apache-2.0
"""Second moments as rows times columns: what Adafactor's descendants share."""

import math

import chex
from jax import lax
import jax.numpy as jnp

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


def rms(x: chex.Array, per_slice: bool = False) -> chex.Array:
  """The root of the mean square, of all or of each matrix of a stack.

  Args:
    x: any shape.
    per_slice: over the last two axes alone, which are kept with length 1.

  Returns:
    A scalar, or (..., 1, 1).
  """
  if per_slice and x.ndim > 2:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=(-2, -1), keepdims=True))
  return jnp.sqrt(jnp.mean(jnp.square(x))) if x.size else jnp.zeros(())


def rms_of_matrices(x: chex.Array) -> chex.Array:
  """The root mean square of each matrix of a stack, or of a whole vector.

  Args:
    x: any shape; last axes of length 1 after two others do not count.

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
  """``u / max(1, RMS(u) / threshold)``."""
  return u / jnp.maximum(1.0, rms(u, per_slice) / threshold)


def zero_rows(p: chex.Array, squeezed: int = 0) -> chex.Array:
  """(..., m) float32 zeros for a parameter of shape (..., m, n).

  Args:
    p: the parameter.
    squeezed: so many last axes, of length 1, do not count.

  Returns:
    An array, sharded like the axes of the parameter.
  """
  return _trees.zeros_along(p, range(p.ndim - squeezed - 1))


def zero_cols(p: chex.Array, squeezed: int = 0) -> chex.Array:
  """(..., n) float32 zeros for a parameter of shape (..., m, n)."""
  last = p.ndim - squeezed - 1
  return _trees.zeros_along(p, [*range(last - 1), last])


def is_factored(shape: tuple[int, ...], min_dim_size: int = 1) -> bool:
  """True for two or more axes, the last two of at least ``min_dim_size``."""
  if len(shape) < 2 or not math.prod(shape):
    return False
  return min(shape[-2:]) >= min_dim_size


def trailing_ones(shape: tuple[int, ...]) -> int:
  """How many last axes have length 1 after two others: those of a 1x1 kernel.

  In PyTorch's order of axes; (out, in, 1, 1) is the matrix (out, in).
  """
  count = 0
  while count < len(shape) - 2 and shape[-1 - count] == 1:
    count += 1
  return count
