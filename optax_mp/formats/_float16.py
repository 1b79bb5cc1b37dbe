# SPDX-License-Identifier: Apache-2.0
"""float16, alone and with a residual: for parameters that must be float16.

float16 has 5 bits of exponent and so is no half of a float32. Its residual is
the rounding error as a signed fraction of half a unit in the last place.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from optax_mp.formats import _base
from optax_mp.formats import _rounding


@dataclasses.dataclass(frozen=True)
class Float16(_base.Alone):
  """Keeps an array in float16.

  **Stored:** one float16 array of the same shape, 2 bytes per value, 11
  significant bits between 6.1e-5 and 65504.

  Args:
    rounding: 'nearest' (ties to even) or 'stochastic' (the mean is exact; needs
      a key).

  Raises:
    ValueError: for another rounding; in ``encode``, where a key is missing.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_mp import formats
    >>> formats.Float16().encode(jnp.array([1.001, 1e6]))
    Array([1.001,   inf], dtype=float16)

  **Caveats:** values above 65504 become infinite, below 3e-8 zero: no format
  for second moments. Noise has 24 bits: below 2^-48 'stochastic' is biased.
  """

  def encode(
    self, x: chex.Array, key: chex.PRNGKey | None = None
  ) -> chex.Array:
    """Rounds ``x`` to float16."""
    if self.rounding == 'nearest':
      return x.astype(jnp.float16)
    noise = _rounding.random_bits(_base.check_key(key, self), x.shape)
    x = x.astype(jnp.float32)
    ulp = 2 * _half_ulp(x.astype(jnp.float16))
    # The magnitude in places has at most 12 bits before the point: floor and
    # rest are exact. Where x lies in the binade below its float16, the grid is
    # twice as fine and every other point of it is used: unbiased all the same.
    places = jnp.abs(x) / ulp
    below = jnp.floor(places)
    up = (_rounding.uniform(noise) < places - below).astype(jnp.float32)
    rounded = jnp.copysign((below + up) * ulp, x)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.float16)

  def decode(
    self, stored: chex.Array, like: jax.ShapeDtypeStruct
  ) -> chex.Array:
    """Widens the stored float16 to the dtype of ``like``."""
    return _rounding.widen(stored).astype(like.dtype)


@dataclasses.dataclass(frozen=True)
class SplitFloat16(_base.WithResidual):
  r"""Keeps a float32 array as float16 plus a fraction of half its last place.

  **Stored:** ``HighLow(high, low)``, of the same shape: ``high`` float16,
  ``low`` int16 (4 bytes per value) or int8 (3 bytes per value).

  With h(x') half a unit in the last place of the float16 x', and N = 32767 or
  127,

  .. math::
    x' = \mathrm{float16}(x), \quad
    \rho = \mathrm{round}(N (x - x') / h(x')), \quad
    \mathrm{decode} = x' + \rho / N \cdot h(x').

  Args:
    residual_bits: 16, exact for 6.1e-5 <= abs(x) <= 65504 and within 2^-40
      below it, or 8, within 2^-18 of abs(x) (rounding to nearest) or 2^-17.
    rounding: of the fraction: 'nearest' or 'stochastic' (needs a key).

  Raises:
    ValueError: for other arguments; in ``encode``, where a key is missing.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_mp import formats
    >>> x, exact = jnp.array([1.001]), formats.SplitFloat16(16)
    >>> bool((exact.decode(exact.encode(x), x) == x).all())
    True

  **Caveats:** a value above 65504 is infinite in float16, and its residual 0.

  References:
    FlashOptim, `arXiv 2602.23349 <https://arxiv.org/abs/2602.23349>`_, 2026
  """

  def encode(
    self, x: chex.Array, key: chex.PRNGKey | None = None
  ) -> _base.HighLow:
    """Rounds ``x`` to float16 and keeps the error as a fraction."""
    high = x.astype(jnp.float16)
    largest, dtype = self._fraction()
    error = x.astype(jnp.float32) - _rounding.widen(high)
    scaled = error / _half_ulp(high) * largest
    if self.rounding == 'nearest':
      scaled = jnp.round(scaled)
    else:
      noise = _rounding.random_bits(_base.check_key(key, self), x.shape)
      size = jnp.floor(jnp.abs(scaled) + _rounding.uniform(noise))
      scaled = jnp.copysign(size, scaled)
    low = jnp.where(jnp.isfinite(high), scaled, 0)
    return _base.HighLow(high, jnp.clip(low, -largest, largest).astype(dtype))

  def decode(
    self, stored: _base.HighLow, like: jax.ShapeDtypeStruct
  ) -> chex.Array:
    """Adds the fraction to the float16."""
    largest, _ = self._fraction()
    # Times the reciprocal: compilers make that of a division by a constant.
    fraction = stored.low.astype(jnp.float32) * jnp.float32(1 / largest)
    x = _rounding.widen(stored.high) + fraction * _half_ulp(stored.high)
    return x.astype(like.dtype)

  def _fraction(self):
    if self.residual_bits == 16:
      return 32767, jnp.int16
    return 127, jnp.int8


def _half_ulp(half: chex.Array) -> jax.Array:
  """Half a unit in the last place of a float16, as float32: a power of two."""
  exponent = jnp.maximum((_rounding.half_bits(half) >> 10) & 0x1F, 1)
  # 2^(exponent - 15) is the binade, 2^-10 of it a place, 2^-11 half of one.
  return _rounding.from_bits((exponent + (127 - 15 - 11)) << 23)
