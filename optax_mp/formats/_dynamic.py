# SPDX-License-Identifier: Apache-2.0
"""The dynamic trees of 8-bit optimizers, by arithmetic instead of a search.

A code is zero, or a decade (unary, in the paper) and a linear fraction in it:
decade i of E has f 2^i values, f = 1 in signed maps and 2 in unsigned ones,

    10^(i - E + 1) (0.1 + 0.9 (j + 1/2) / (f 2^i)),    j = 0 ... f 2^i - 1,

and the last code is 1. Counted through, the codes of decade i are f 2^i + j
(less one if f = 2), so both directions are a few compares and multiplications.
"""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Dynamic:
  """The tree of one sign: E decades, twice as fine where ``doubled``."""

  decades: int
  doubled: bool = False

  @property
  def top(self) -> int:
    """The code of 1."""
    return (2**self.decades - 1) * (1 + self.doubled) + 1

  @property
  def _shift(self) -> int:
    """Codes plus this are f 2^i + j."""
    return int(self.doubled)

  def value(self, code: jax.Array) -> jax.Array:
    """Code n = 2^i f + j is mu f 2^i, with 1 <= mu < 2 and j = (mu - 1) ..."""
    n = (code + self._shift).astype(jnp.float32)
    bits = lax.bitcast_convert_type(n, jnp.int32)
    exponent = (bits >> 23) - 127
    decade = exponent - self._shift
    mantissa = lax.bitcast_convert_type(
      (bits & 0x007FFFFF) | 0x3F800000, jnp.float32
    )
    fraction = 0.9 * mantissa - 0.8 + 0.45 * _power_of_2(-exponent)
    value = _select([10.0**-q for q in range(self.decades)], self._up(decade))
    value = jnp.where(code >= self.top, 1.0, value * fraction)
    return jnp.where(code <= 0, 0.0, value)

  def below(self, x: jax.Array) -> jax.Array:
    decade = jnp.zeros(x.shape, jnp.int32)
    for q in range(1, self.decades):
      decade += (x >= 10.0 ** (q - self.decades)).astype(jnp.int32)
    up = _select([10.0**q for q in range(self.decades)], self._up(decade))
    cells = _power_of_2(decade + self._shift)
    inside = jnp.floor((x * up - 0.1) * (cells / 0.9) - 0.5)
    # -1 where x is below the middle of the first cell: the code before it.
    code = (cells + inside).astype(jnp.int32) - self._shift
    return jnp.where(x >= 1.0, self.top, jnp.clip(code, 0, self.top - 1))

  def _up(self, decade: jax.Array) -> jax.Array:
    return self.decades - 1 - decade


def _power_of_2(exponent: jax.Array) -> jax.Array:
  """Exactly 2^exponent, from the exponent's bits."""
  return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _select(values: list[float], index: jax.Array) -> jax.Array:
  """values[index] by a chain of selects; a gather would not fuse."""
  chosen = jnp.full(index.shape, values[0], jnp.float32)
  for i, value in enumerate(values[1:], 1):
    chosen = jnp.where(index >= i, value, chosen)
  return chosen
