# SPDX-License-Identifier: Apache-2.0
"""Rounding on bits: pure functions of integers, which no compiler folds away.

A float32 is ``s eeeeeeee mmmmmmm mmmmmmmmmmmmmmmm``: its upper 16 bits are a
bfloat16, so rounding to bfloat16 is integer arithmetic on the word, and adding
1 to it moves the magnitude up by one unit in the last place for either sign.
"""

import chex
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

_INFINITY = 0x7F800000
_NAN = 0x7FC00000  # the NaN of NumPy and JAX
_GOLDEN = np.uint32(0x9E3779B9)  # 2^32 / golden ratio, odd


def to_bits(x: chex.Array) -> jax.Array:
  """Float32 -> its word, uint32, every NaN made the canonical one.

  Rounding a NaN as an integer would carry 0x7FFFFFFF into -0 and round
  0x7F800001 to infinity.
  """
  bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  return jnp.where((bits & 0x7FFFFFFF) > _INFINITY, jnp.uint32(_NAN), bits)


def is_infinite(bits: jax.Array) -> jax.Array:
  """True where a float32 word spells plus or minus infinity."""
  return (bits & 0x7FFFFFFF) == _INFINITY


def is_zero(x: jax.Array) -> jax.Array:
  """Whether a float32 is 0, or subnormal: CPUs and TPUs take that for 0."""
  return (lax.bitcast_convert_type(x, jnp.uint32) & 0x7FFFFFFF) < 0x00800000


def from_bits(bits: jax.Array) -> jax.Array:
  """Uint32 word -> the float32 it spells."""
  return lax.bitcast_convert_type(bits, jnp.float32)


def to_half(bits: jax.Array, dtype=jnp.bfloat16) -> jax.Array:
  """Uint32 holding 16 bits -> the 16-bit float that they spell."""
  return lax.bitcast_convert_type(bits.astype(jnp.uint16), dtype)


def half_bits(half: chex.Array) -> jax.Array:
  """bfloat16 or float16 -> its 16 bits, in a uint32."""
  return lax.bitcast_convert_type(half, jnp.uint16).astype(jnp.uint32)


def widen(half: chex.Array) -> jax.Array:
  """bfloat16 or float16 -> float32, exactly, through integer bits."""
  bits = half_bits(half)
  if half.dtype == jnp.bfloat16:
    return from_bits(bits << 16)
  sign, exponent, mantissa = bits >> 15, (bits >> 10) & 0x1F, bits & 0x3FF
  # Exponents are biased by 15 in float16, by 127 in float32; 31 and 255 are
  # infinity and NaN; float16 subnormals count multiples of 2^-24.
  rebiased = jnp.where(exponent == 0x1F, jnp.uint32(0xFF), exponent + 112)
  normal = (rebiased << 23) | (mantissa << 13)
  subnormal = lax.bitcast_convert_type(
    mantissa.astype(jnp.float32) * 2.0**-24, jnp.uint32
  )
  magnitude = jnp.where(exponent == 0, subnormal, normal)
  return from_bits((sign << 31) | magnitude)


def round_nearest(bits: jax.Array, drop: int) -> jax.Array:
  """``bits`` without its last ``drop`` bits, to nearest, ties to even."""
  odd = (bits >> drop) & 1
  return (bits + (2 ** (drop - 1) - 1) + odd) >> drop


def round_stochastic(bits: jax.Array, drop: int, noise: jax.Array) -> jax.Array:
  """``bits`` without its last ``drop`` bits, up as often as they weigh.

  Unbiased in magnitude: with R uniform in [0, 2^drop), floor((bits + R) /
  2^drop) has the mean bits / 2^drop. Words whose last bits are 0, infinities
  among them, stay what they are.

  Args:
    bits: uint32 words.
    drop: how many low bits go.
    noise: uint32, uniform.

  Returns:
    uint32 of 32 - drop bits.
  """
  return (bits + (noise >> (32 - drop))) >> drop


def random_bits(
  key: chex.PRNGKey, shape: tuple[int, ...], even: bool = False
) -> jax.Array:
  """Uniform uint32 noise: a hash of the key and of each value's position.

  A counter-based generator. It has no state and looks at global positions, so
  the draw is the same on any number of devices; it is ten integer operations a
  value, which fuse into the update without a temporary. (Threefry takes several
  times as many and, on the CPU, temporaries.)

  Args:
    key: a typed key or raw key data; each of its words takes one round.
    shape: the shape of the noise.
    even: the last word of the key is the number of a step, and the draws of a
      value over steps are a Weyl sequence (steps of 2^32 / golden ratio) that
      starts at random. Of n roundings that each go up with the probability f,
      n f +- 1 or so do, not n f +- sqrt(n f), so that less is added to a long
      average. The draws of two steps are not independent: only for what hardly
      answers to its rounding, as a parameter does through its gradient, and
      where f is nearly the same from one rounding to the next.

  Returns:
    uint32 of ``shape``.
  """
  if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    key = jax.random.key_data(key)
  words = list(key.astype(jnp.uint32))
  step = words.pop() * _GOLDEN if even else jnp.uint32(0)
  bits = _position(shape) * _GOLDEN
  for word in words:
    bits = mix(bits ^ word)
  return bits + step


def uniform(bits: jax.Array) -> jax.Array:
  """Random uint32 -> float32 in [0, 1), a multiple of 2^-24."""
  return (bits >> 8).astype(jnp.float32) * 2.0**-24


def _position(shape: tuple[int, ...]) -> jax.Array:
  """Row-major index of each value, modulo 2^32."""
  position, stride = jnp.zeros(shape, jnp.uint32), 1
  for axis in reversed(range(len(shape))):
    index = lax.broadcasted_iota(jnp.uint32, shape, axis)
    position += index * jnp.uint32(stride % 2**32)
    stride *= shape[axis]
  return position


def mix(bits: jax.Array) -> jax.Array:
  """A bijection of 32-bit words in which every bit depends on every other.

  The constants are those of Chris Wellons' lowbias32 (public domain).
  """
  bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
  bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
  return bits ^ (bits >> 16)
