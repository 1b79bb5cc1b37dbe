# SPDX-License-Identifier: Apache-2.0
"""Any format, with its rounding error kept in a second format."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_mp.formats import _base
from optax_mp.formats import _ends
from optax_mp.formats import _fitted
from optax_mp.formats import _paths
from optax_mp.formats import _squares

# Relative to the rounded value no rounding error is larger: neighbouring codes
# are a factor of four apart at most, the first two of fp8 to the power two.
_MOST = 4.0


@_base.Stored.register
class Feedback(NamedTuple):
  """A stored array and, stored as well, the error of storing it."""

  value: Any  # as `ErrorFeedback.format` stores x
  residual: Any  # as `ErrorFeedback.residual` stores x - decode(value)

  @property
  def value_shape(self) -> tuple[int, ...] | None:
    """The shape of the array that is stored, if its format tells."""
    return getattr(self.value, 'value_shape', None)


@dataclasses.dataclass(frozen=True)
class ErrorFeedback:
  r"""Keeps an array in one format and its rounding error in another.

  **Stored:** ``Feedback(value, residual)``; bytes per value are the sum of both
  formats'.

  .. math::
    a = \mathrm{encode}_1(x), \qquad
    e = \mathrm{encode}_2(x - \mathrm{decode}_1(a)), \qquad
    \mathrm{decode} = \mathrm{decode}_1(a) + \mathrm{decode}_2(e)

  where the errors of ``format`` are in proportion to values (``BlockInt`` with
  map='log', ``Float8``), e is the error divided by the value.
  Otherwise the largest values of a block would set the scale of its residuals.

  The next step gets back the rounding error of ``format``, up to the rounding
  error of the residual format.

  Args:
    format: the format of the value.
    residual: the format of ``x - decode(encode(x))``.

  Raises:
    ValueError: if either is not a format.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_mp import formats
    >>> both = formats.ErrorFeedback(formats.BFloat16(), formats.BFloat16())
    >>> x = jnp.array([1.001])
    >>> print(f'{both.decode(both.encode(x), x)[0]:.8f}')
    1.00099945

  **Caveats:** bfloat16 with a bfloat16 residual takes the 4 bytes of float32
  and keeps less. :class:`Split` does the same in 3 bytes, or exactly in 4; this
  class is for residuals smaller than the value.

  References:
    Seide et al., `1-Bit Stochastic Gradient Descent
    <https://www.isca-archive.org/interspeech_2014/seide14_interspeech.html>`_,
    2014 (where feeding back the quantization error comes from)
  """

  format: _base.Format
  residual: _base.Format

  def __post_init__(self):
    _base.check_format(self.format, 'format')
    _base.check_format(self.residual, 'residual')
    if not getattr(self.residual, 'signed', True):
      raise ValueError(
        '`residual` must be a format with signs, as errors have them; got '
        f'{self.residual}.'
      )

  def fit(self, x: chex.Array) -> Any:
    """The scales of the value; None for a format without scales."""
    return _fitted.fit(self.format, x)

  def encode(
    self, x: chex.Array, key: chex.PRNGKey | None = None, scales: Any = None
  ) -> Feedback:
    """Stores ``x`` and its rounding error."""
    own_key = None if key is None else _paths.leaf_key(key, (), 'residual')
    x = jnp.asarray(x, jnp.float32)
    value = _fitted.encode(self.format, x, key, scales)
    seen = self.format.decode(value, jax.ShapeDtypeStruct(x.shape, x.dtype))
    # An infinity minus itself is NaN. A huge value comes back as one number,
    # whatever it was: the difference is no rounding error, and would set the
    # scale of all residuals beside it.
    near = jnp.isfinite(seen) & (jnp.abs(seen) != _ends.OUTLIER)
    error = jnp.where(near, x - seen, 0.0)
    if self.relative:
      error = jnp.where(seen == 0, 0.0, error / seen)
      error = jnp.where(jnp.abs(error) <= _MOST, error, 0.0)
    return Feedback(value, self.residual.encode(error, own_key))

  def decode(self, stored: Feedback, like: jax.ShapeDtypeStruct) -> chex.Array:
    """Adds the residual to the value, in float32."""
    wide = jax.ShapeDtypeStruct(like.shape, jnp.float32)
    value = self.format.decode(stored.value, wide)
    residual = self.residual.decode(stored.residual, wide)
    # An infinity times 0 would be NaN.
    residual = jnp.where(jnp.isfinite(value), residual, 1.0)
    both = value + (value * residual if self.relative else residual)
    if not self.signed:
      # The residual is coarse beside the smallest values of its block.
      both = jnp.where(value > 0, jnp.maximum(both, 2.0**-126), value)
    return both.astype(like.dtype)

  def note(self, shape: tuple[int, ...]) -> str:
    """A remark on arrays of this shape, which the plan shows."""
    return _fitted.note(self.format, shape)

  @property
  def signed(self) -> bool:
    """Whether values may be negative."""
    return getattr(self.format, 'signed', True)

  @property
  def without_signs(self) -> 'ErrorFeedback':
    """The same for values that are not negative; errors keep their signs."""
    return dataclasses.replace(self, format=_squares.without_signs(self.format))

  @property
  def exact_zero(self) -> bool:
    """Whether a zero comes back as zero."""
    both = (self.format, self.residual)
    return all(getattr(format, 'exact_zero', True) for format in both)

  @property
  def relative(self) -> bool:
    """Whether errors are in proportion to values."""
    return getattr(self.format, 'relative', False)
