# SPDX-License-Identifier: Apache-2.0
"""Rows times columns: a matrix of second moments in two vectors."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_mp.formats import _base

_TINY = 2.0**-126


@_base.Stored.register
class Factors(NamedTuple):
  """Means along the last two axes of an array of shape (..., R, C)."""

  row: chex.Array  # (..., R), float32: the mean of each row
  column: chex.Array  # (..., C), float32: the mean of each column


@dataclasses.dataclass(frozen=True)
class Factored:
  r"""Keeps the row and column means of an array that is not negative.

  **Stored:** ``Factors(row, column)``, 4 (R + C) bytes for R C values: next to
  nothing. With r the means of the rows and c those of the columns,

  .. math::
    \mathrm{decode}_{ij} = r_i c_j / \mathrm{mean}(r),

  the array of rank 1 with the same sums in each row and column, and the nearest
  one in Kullback-Leibler divergence. As averages are linear, an optimizer whose
  second moment is kept so averages the means of g^2, as Adafactor does, but
  each step still sees its own g^2 whole.

  Raises:
    ValueError: in ``encode``, for arrays of fewer than two axes.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_mp import formats
    >>> x = jnp.outer(jnp.arange(4.0), jnp.ones(8))
    >>> format = formats.Factored()
    >>> bool((format.decode(format.encode(x), x) == x).all())
    True
    >>> formats.bits_per_value(format, (4096, 4096))
    0.015625

  **Caveats:** what is not of rank 1 is lost; for second moments only. A
  negative value makes NaN of its matrix. Leading axes are kept: a stack
  of layers has factors for each. Means are float32: of rows or columns they
  are zero below 2^-126, and infinite where a sum is.

  References:
    Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018;
    Li et al., `Memory Efficient Optimizers with 4-bit States
    <https://arxiv.org/abs/2309.01507>`_, 2023 (beside a 4-bit first moment)
  """

  signed = False  # rows and columns times each other are not negative

  def fit(self, x: chex.Array) -> Factors:
    """All that is stored."""
    if x.ndim < 2:
      raise ValueError(
        f'`x` must have two axes or more for `Factored`; got shape {x.shape}. '
        'Give such leaves another format, with a rule (path, leaf) -> format.'
      )
    x = jnp.asarray(x, jnp.float32)
    x = jnp.where(x < 0, jnp.nan, x)
    return Factors(jnp.mean(x, -1), jnp.mean(x, -2))

  def encode(
    self,
    x: chex.Array,
    key: chex.PRNGKey | None = None,
    scales: Factors | None = None,
  ) -> Factors:
    """The means of rows and columns; those of ``fit``, if there are any yet."""
    del key
    return self.fit(x) if scales is None else scales

  def decode(self, stored: Factors, like: jax.ShapeDtypeStruct) -> chex.Array:
    """Rows times columns, divided by the mean of all."""
    row, column = map(jnp.asarray, stored)
    mean = jnp.mean(row, -1, keepdims=True)
    mean = jnp.where(mean < jnp.inf, mean, jnp.nan)
    # Divided before multiplied: the product of two small means underflows.
    share = row / jnp.where(mean == 0, 1.0, mean)
    product = share[..., :, None] * column[..., None, :]
    nonzero = (row > 0)[..., :, None] & (column > 0)[..., None, :]
    product = jnp.where(nonzero, jnp.maximum(product, _TINY), product)
    return product.astype(like.dtype)
