# SPDX-License-Identifier: Apache-2.0
"""bfloat16: two bytes, 8 significant bits, the range of float32."""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from optax_mp.formats import _base
from optax_mp.formats import _rounding


@dataclasses.dataclass(frozen=True)
class BFloat16(_base.Alone):
  r"""Keeps an array in bfloat16.

  **Stored:** one bfloat16 array of the same shape, 2 bytes per value.

  With :math:`\mathrm{ulp}(x)` the distance of neighbouring bfloat16 numbers at
  x, at most 2^-7 of it,

  .. math::
    |\mathrm{decode}(\mathrm{encode}(x)) - x| \le \mathrm{ulp}(x) / 2
    \quad\text{(nearest)}, \qquad
    \mathbb{E}[\mathrm{decode}(\mathrm{encode}(x))] = x
    \quad\text{(stochastic)}.

  Args:
    rounding: 'nearest' (ties to even) or 'stochastic' (up or down with
      probabilities that make the mean exact; needs a key).

  Raises:
    ValueError: for another rounding; in ``encode``, where a key is missing.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from optax_mp import formats
    >>> x = jnp.full(10_000, 1.001)
    >>> float(formats.BFloat16().encode(x).mean(dtype=jnp.float32))
    1.0
    >>> noisy = formats.BFloat16('stochastic').encode(x, jax.random.key(0))
    >>> print(f'{noisy.mean(dtype=jnp.float32):.4f}')
    1.0010

  **Caveats:** an average that is rounded to nearest at each step stalls as soon
  as one step changes it by less than 1/256: a second moment with b2 = 0.999
  never decays. Use 'stochastic' there, or :class:`Split`.

  References:
    Zamirai et al., `Revisiting BFloat16 Training
    <https://arxiv.org/abs/2010.06192>`_, 2020
  """

  def encode(
    self, x: chex.Array, key: chex.PRNGKey | None = None
  ) -> chex.Array:
    """Rounds ``x`` to bfloat16."""
    if self.rounding == 'nearest':
      return x.astype(jnp.bfloat16)
    noise = _rounding.random_bits(_base.check_key(key, self), x.shape)
    bits = _rounding.to_bits(x)
    return _rounding.to_half(_rounding.round_stochastic(bits, 16, noise))

  def decode(
    self, stored: chex.Array, like: jax.ShapeDtypeStruct
  ) -> chex.Array:
    """Widens the stored bfloat16 to the dtype of ``like``."""
    return _rounding.widen(stored).astype(like.dtype)
