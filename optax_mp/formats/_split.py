# SPDX-License-Identifier: Apache-2.0
"""float32 = bfloat16 + the 16 or 8 bits below it, cut with integers."""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from optax_mp.formats import _base
from optax_mp.formats import _rounding


@dataclasses.dataclass(frozen=True)
class Split(_base.WithResidual):
  r"""Keeps a float32 array as bfloat16 plus the low bits that rounding removes.

  **Stored:** ``HighLow(high, low)``, of the same shape: ``high`` bfloat16,
  ``low`` uint16 (4 bytes per value, exact) or uint8 (3 bytes per value, 16
  significant bits).

  With u the bits of x, first rounded to 24 bits where r = 8 residual bits are
  kept, and b(l) = 1 where l >= 2^(r-1), else 0::

      float32   s eeeeeeee mmmmmmm mmmmmmmm mmmmmmmm
                \---- high -----/  \-low 8/
                                   \---- low 16 ---/

      encode    low  = u mod 2^r        high = u div 2^r + b(low)
      decode    u = (high - b(low)) 2^r + low

  So ``high`` is the nearest bfloat16 (ties away from zero), a weight that a
  model can use as it is, and ``low``, read as a signed number, is its error.

  Args:
    residual_bits: 16, every float32 comes back bit for bit (a NaN as the
      canonical one), or 8, every value within 2^-16 of itself (rounding to
      nearest) or 2^-15 (stochastic).
    rounding: of the 24 bits where ``residual_bits=8``: 'nearest' (ties to even)
      or 'stochastic' (needs a key).

  Raises:
    ValueError: for other arguments; in ``encode``, where a key is missing.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_mp import formats
    >>> x = jnp.array([1.001, 3e-41, jnp.inf])
    >>> exact = formats.Split(16)
    >>> exact.encode(x).high
    Array([1, 0, inf], dtype=bfloat16)
    >>> bool((exact.decode(exact.encode(x), x) == x).all())
    True
    >>> near = formats.Split(8)
    >>> print(f'{near.decode(near.encode(x), x)[0]:.7f}')
    1.0010071

  **Savings:** against float32 weights with a bfloat16 copy (6 bytes), 2 bytes
  (exact) or 3.

  **Caveats:** never pair ``low`` with a bfloat16 made by ``astype``: that
  rounds ties to even, and joining would be off by a whole unit in the last
  place. A finite value that rounds to infinity shows as infinity in ``high``
  and is still decoded exactly.

  References:
    `Revisiting BFloat16 Training <https://arxiv.org/abs/2010.06192>`_, 2020;
    Lewandowski and Kosson, `Memory Efficient Mixed-Precision Optimizers
    <https://arxiv.org/abs/2309.12381>`_, 2023 (extra bits beside half-precision
    weights); the tie rule is that of NVIDIA Transformer Engine's FusedAdam
  """

  def encode(
    self, x: chex.Array, key: chex.PRNGKey | None = None
  ) -> _base.HighLow:
    """Cuts ``x`` into a bfloat16 and the bits below it."""
    r = self.residual_bits
    word = self._rounded(x, key)  # 16 + r bits
    # `high` is made from the stored `low`, not beside it: XLA:TPU writes two
    # outputs in one pass only where one is made from the other.
    low = word.astype(jnp.uint16 if r == 16 else jnp.uint8)
    high = (word >> r) + _carry(low.astype(jnp.uint32), r)
    return _base.HighLow(_rounding.to_half(high), low)

  def decode(
    self, stored: _base.HighLow, like: jax.ShapeDtypeStruct
  ) -> chex.Array:
    """Joins the halves. A ``high`` of 0 is 0, whatever ``low`` says."""
    r = self.residual_bits
    high = _rounding.half_bits(stored.high)
    low = jnp.asarray(stored.low, jnp.uint32)
    # No split gives high = 0 with a carry, but a user who sets a weight to zero
    # beside an old residual does; borrowing from 0 would spell a NaN.
    carry = jnp.where((high & 0x7FFF) == 0, 0, _carry(low, r))
    word = ((high - carry) << r) | low
    return _rounding.from_bits(word << (16 - r)).astype(like.dtype)

  def _rounded(self, x: chex.Array, key: chex.PRNGKey | None) -> jax.Array:
    """The word of ``x``, rounded to 16 + residual_bits bits."""
    bits = _rounding.to_bits(x)
    if self.residual_bits == 16:
      return bits
    if self.rounding == 'nearest':
      word = _rounding.round_nearest(bits, 8)
    else:
      noise = _rounding.random_bits(_base.check_key(key, self), x.shape)
      word = _rounding.round_stochastic(bits, 8, noise)
    # The largest finite values would round to infinity and lose their master.
    overflow = _rounding.is_infinite(word << 8) & ~_rounding.is_infinite(bits)
    return jnp.where(overflow, word - 1, word)


def _carry(word: jax.Array, residual_bits: int) -> jax.Array:
  """1 where the low half is at least one half: the high half is rounded up."""
  return (word >> (residual_bits - 1)) & 1
