# SPDX-License-Identifier: Apache-2.0
"""Rows times columns: a matrix of second moments in two vectors."""

import dataclasses
from typing import NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from optax_mp.formats import _base
from optax_mp.formats import _ends
from optax_mp.formats import _reductions
from optax_mp.formats import _rounding

# Kinds of values, as they come back: usual ones, then those left out of means.
_KINDS = (0.0, _ends.OUTLIER, np.inf, np.nan)
_WORDS = [np.float32(kind).view(np.int32) for kind in _KINDS]
_INFINITE, _NAN = np.uint32(2), np.uint32(3)
_DOWN = 2.0**-64  # keeps sums of huge values finite
_SIGN, _WITHOUT_KIND = np.uint32(2**31), np.uint32(2**32 - 4)


@_base.Stored.register
class Factors(NamedTuple):
  """Means along the last two axes of an array of shape (..., R, C)."""

  # Negative if some values were left out of the mean: see `Factored`.
  row: chex.Array  # (..., R), float32: the mean of each row
  column: chex.Array  # (..., C), float32: the mean of each column

  @property
  def value_shape(self) -> tuple[int, ...]:
    """The shape of the array that is stored."""
    return (*self.row.shape, *self.column.shape[-1:])


@dataclasses.dataclass(frozen=True)
class Factored:
  r"""Keeps the row and column means of an array that is not negative.

  **Stored:** ``Factors(row, column)``, 4 (R + C) bytes for R C values: next to
  nothing. With r the means of the rows and c the means of columns,

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

  **Caveats:** only an array of rank 1 is kept exactly, so this format is for
  second moments only. Leading axes are kept: a stack of layers has factors for
  each. Means are float32: a mean of a row or a column below 2^-126 is zero.

  **Overflow:** infinities, NaNs and values above 2^96 beside smaller ones are
  left out of the means; a negative value counts as NaN. The means of their row
  and their column are marked, in the sign and the last two bits. Where both are
  marked, ``decode`` gives 2^120 for a large value, an infinity or a NaN; if the
  two marks differ, the first of these three. Usual values at the crossing of a
  marked row and a marked column are lost: two infinities in different rows and
  columns come back as four.

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
    x = jnp.where(x <= -_ends.TINY, jnp.nan, jnp.maximum(x, 0.0))
    pairs = [_means(x, axis) for axis in (-1, -2)]
    has_usual = jnp.any(pairs[0][0] > 0, -1, keepdims=True)
    row, column = (_of_usual_or_huge(*pair, has_usual) for pair in pairs)
    kinds = [_kind(others, has_usual) for _, others in pairs]
    shares = [_share(*pair) for pair in zip((row, column), kinds, strict=True)]
    return Factors(
      _marked(row, kinds[0], _filling(*shares)),
      _marked(column, kinds[1], _filling(*shares[::-1])),
    )

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
    (row, row_lost), (column, column_lost) = map(_unmarked, stored)
    # Neither the sum of huge means nor their product may overflow, nor the
    # product of two small ones underflow: hence divided before multiplied.
    largest = jnp.max(row, -1, keepdims=True, initial=0.0)
    scaled = row * jnp.where(largest > _ends.HUGE_SQUARE, _DOWN, 1.0)
    mean = jnp.mean(scaled, -1, keepdims=True)
    share = scaled / jnp.where(mean == 0, 1.0, mean)
    product = share[..., :, None] * column[..., None, :]
    nonzero = (row > 0)[..., :, None] & (column > 0)[..., None, :]
    within = jnp.clip(product, _ends.TINY, _ends.LARGEST)
    product = jnp.where(nonzero, within, product)
    # The words of 0, 2^120, infinity and NaN: one comparison for each value.
    lost = jnp.minimum(row_lost[..., :, None], column_lost[..., None, :])
    lost_value = lax.bitcast_convert_type(lost, jnp.float32)
    return jnp.where(lost > 0, lost_value, product).astype(like.dtype)


def _means(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
  """Means along an axis: of the usual values, and of the others, made smaller.

  The second mean is infinite only if one of its values is.
  """

  def split(x):
    usual = x <= _ends.HUGE_SQUARE
    return jnp.where(usual, x, 0.0), jnp.where(usual, 0.0, x * _DOWN)

  def apart(x):
    usual, others = split(x)
    return jnp.mean(usual, axis), jnp.mean(others, axis)

  def in_pairs(x):
    both = jnp.sum(lax.complex(*split(x)), axis)
    # Part by part: an infinity times a complex number is NaN in both.
    return tuple(part(both) / x.shape[axis] for part in (lax.real, lax.imag))

  return _reductions.by_size(x, one=in_pairs, two=apart, tpu=apart)


def _of_usual_or_huge(
  usual: jax.Array, others: jax.Array, has_usual: jax.Array
) -> jax.Array:
  """The means that count: of the others where nothing else is in the matrix."""
  is_finite = others < jnp.inf
  # The mean of largest numbers may be rounded to more than the largest one.
  huge = jnp.minimum(others, _ends.LARGEST * _DOWN) * (1 / _DOWN)
  huge = jnp.where(is_finite, huge, 0.0)
  # The mean beside an infinity is lost, and taken to be the largest one.
  largest = jnp.max(huge, -1, keepdims=True, initial=0.0)
  # If no other mean is above zero, any number will do: `decode` divides by it.
  largest = jnp.where(largest > 0, largest, 1.0)
  return jnp.where(has_usual, usual, jnp.where(is_finite, huge, largest))


def _kind(others: jax.Array, has_usual: jax.Array) -> jax.Array:
  """The worst kind of the values that a mean leaves out, uint32; 0 for none.

  Args:
    others: the mean of these values, made smaller.
    has_usual: whether the matrix has usual values that are not zero. If not,
      values above 2^96 are usual there.
  """
  huge = (has_usual & (others > 0)).astype(jnp.uint32)
  kind = jnp.where(others < jnp.inf, huge, _INFINITE)
  return jnp.where(jnp.isnan(others), _NAN, kind)


def _marked(mean: jax.Array, kind: jax.Array, filled: jax.Array) -> jax.Array:
  """A mean with its kind in the sign and the last two bits.

  Args:
    mean: the values that were left out counted as zeros.
    kind: of these values.
    filled: what ``mean`` is multiplied by where there are any.

  Returns:
    The means, unchanged where the kind is 0.
  """
  word = _rounding.to_bits(jnp.maximum(mean * filled, _ends.TINY))
  marked = _rounding.from_bits((word & _WITHOUT_KIND) | _SIGN | kind)
  return jnp.where(kind > 0, marked, mean)


def _filling(own: jax.Array, across: jax.Array) -> jax.Array:
  """How much larger marked rows are with the values that they have lost.

  Where a marked row crosses a marked column, ``decode`` does not know the
  values. If these counted as zeros, the marked rows would become smaller with
  each store. Let P be the share of all known values in marked columns, Q in
  marked rows, and N = 1 - P - Q in neither. In a matrix of rank 1 the lost
  values have P Q / N, so that the marked rows are (N + P) / N times as large.

  Args:
    own: the share of the marked rows, Q; or of columns.
    across: the share of the marked columns, P; or of rows.

  Returns:
    The factor; 1 where nearly all is marked and nothing can be said.
  """
  neither = 1 - own - across
  known = neither > 2.0**-12
  return jnp.where(known, 1 + across / jnp.where(known, neither, 1.0), 1.0)


def _share(mean: jax.Array, kind: jax.Array) -> jax.Array:
  """The share of all values that the marked means have."""
  total = jnp.sum(mean, -1, keepdims=True)
  marked = jnp.sum(jnp.where(kind > 0, mean, 0.0), -1, keepdims=True)
  return marked / jnp.where(total > 0, total, 1.0)


def _unmarked(mean: chex.Array) -> tuple[jax.Array, jax.Array]:
  """A mean, and the word of what was left out of it; 0 if nothing was.

  The words are int32, whose order is that of the kinds.
  """
  mean = jnp.asarray(mean)
  word = lax.bitcast_convert_type(mean, jnp.uint32)
  size = _rounding.from_bits(word & _WITHOUT_KIND & ~_SIGN)
  size = jnp.where(size > _ends.TINY, size, 0.0)
  marked = mean < 0
  kind = jnp.where(marked, (word & ~_WITHOUT_KIND).astype(jnp.int32), 0)
  lost = jnp.select([kind == 0, kind == 1, kind == 2], _WORDS[:3], _WORDS[3])
  return jnp.where(marked, size, mean), lost
