# SPDX-License-Identifier: Apache-2.0
"""The ends of the values that share a scale, and whether all are numbers.

One value's overflow stays its own. An infinity or a NaN is no end; that there
is one is told beside the ends, and the block is called *odd*. Nor is a finite
value an end that only an overflow can have made: one above 2^48, of squares
2^96, among others that are below. Where all that is not zero is above, it is
nothing special.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

# Of momenta, 1e-4 times a gradient whose square overflows is above it; of
# second moments, 1e-4 times the square of 1e17.
HUGE = 2.0**48
HUGE_SQUARE = HUGE**2
# What a huge value comes back as where there are no signs: its root divides a
# moment, and must not be too small.
OUTLIER = 2.0**120
LARGEST = float(np.finfo(np.float32).max)
TINY = 2.0**-126  # the smallest normal number; what is below counts as zero
# The smallest scale of an odd block: its codes of others do not underflow.
LEAST = 2.0**-120

# Words of float32, and what their keys, of 31 bits and a sign, are made of.
_SIGN = np.int32(-(2**31))
_ALL = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_NORMAL = np.int32(0x00800000)
_NONE = np.int32(0)
_HUGE = np.float32(HUGE).view(np.int32)
_RAISED = _ALL - _HUGE

# Of smaller leaves XLA:GPU reads more, for an H100, for one reduction than for
# two; of larger ones, for an A100, it keeps what two of them read in float32.
FEW = 768 * 768


def _as_it_is(x: jax.Array) -> jax.Array:
  return x


class Over(NamedTuple):
  """Which values of an array share a scale."""

  axes: tuple[int, ...]  # once it is split
  split: Callable[[jax.Array], jax.Array] = _as_it_is
  # Of what is left, the shape that is stored: at once, as XLA:TPU would copy
  # each of the parts that scales are made of.
  kept: Callable[[jax.Array], jax.Array] = _as_it_is


class Ends(NamedTuple):
  """Of the values that share a scale, without their axes."""

  low: jax.Array  # the smallest that is not zero; TINY in an odd block
  high: jax.Array  # the largest, 0 where there is none
  odd: jax.Array  # whether there are others, which are no ends


def largest(x: jax.Array, over: Over) -> tuple[jax.Array, jax.Array]:
  """The largest magnitude, and whether there are values that are no numbers.

  A value above 2^48 counts only where all others are zero. It is none of the
  others that makes a block odd: it has a sign, and may come back smaller.

  One reduction, of integers: in the order zero, huge, all others; and a sign
  for what is no number. Or two, on a GPU for small leaves.
  """

  def in_one(x):
    words = _words(x) & _ALL
    keys = jnp.where(words <= _HUGE, words + _RAISED, words - _HUGE)
    keys = jnp.where(words < _NORMAL, 0, keys)
    keys = jnp.where(words < _INFINITY, keys, _SIGN)
    keys = _reduce(_larger, _NONE, over.split(keys), over)
    odd, keys = keys < 0, keys & _ALL
    huge = jnp.where(keys > 0, keys + _HUGE, 0)
    words = jnp.where(keys >= _RAISED + _NORMAL, keys - _RAISED, huge)
    return _as_float(words), odd

  def apart(x):
    x = jnp.abs(over.split(x))
    _, high = _told_by_words(x, signed=True)
    high = _reduce(jnp.maximum, _SIGN, _words(high), over)
    no_number = (~(x < jnp.inf)).astype(jnp.int32)
    odd = _reduce(jnp.bitwise_or, _NONE, no_number, over)
    return _as_float(high & _ALL), odd > 0

  return _by_size(x, one=in_one, two=apart, others=in_one)


def range_of(size: jax.Array, over: Over, signed: bool) -> Ends:
  """The smallest magnitude that is not zero and the largest.

  Args:
    size: float32, not negative; or NaN.
    over: which values share a scale.
    signed: whether these are magnitudes. Then a huge value is as for
      :func:`largest`; else, above 2^96 among others, it makes its block odd.

  Returns:
    Both ends.
  """

  def in_pairs(size):
    # A view of the pairs and not pairs of a view, which has two users.
    pairs = over.split(lax.complex(*_told_by_words(size, signed)))
    axes = tuple(axis % pairs.ndim for axis in over.axes)
    start = np.complex64(complex(np.inf, -0.0))
    pairs = over.kept(lax.reduce(pairs, start, _wider, axes))
    return _words(lax.real(pairs)), _words(lax.imag(pairs))

  def apart(size):
    low, high = map(_words, _told_by_words(over.split(size), signed))
    low = _reduce(jnp.minimum, _INFINITY, low, over)
    return low, _reduce(jnp.maximum, _SIGN, high, over)

  low, high = _by_size(size, one=in_pairs, two=apart, others=apart)
  # Signs of what is huge or no number; the latter's is the least of all words.
  none = low == _SIGN
  odd = none | ((low < 0) & (high > 0))
  low = jnp.where(odd, _NORMAL, low & _ALL)
  return Ends(_as_float(low), _as_float(high & _ALL), odd)


def both(x: jax.Array, over: Over) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The smallest and the largest number; and as for :func:`largest`."""
  x = over.split(x)
  over = Over(over.axes)
  size, odd = largest(x, over)
  limit = jnp.where(size <= HUGE, HUGE, LARGEST)
  inside = jnp.abs(x) <= jnp.expand_dims(limit, over.axes)
  # Words in the order of numbers; none where there is no number at all.
  words = _in_order(_words(x))
  low = _reduce(jnp.minimum, _ALL, jnp.where(inside, words, _ALL), over)
  high = _reduce(jnp.maximum, -_ALL, jnp.where(inside, words, -_ALL), over)
  low, high = (
    jnp.where(abs(end) == _ALL, 0.0, _as_float(_in_order(end)))
    for end in (low, high)
  )
  return low, high, odd


def _in_order(words: jax.Array) -> jax.Array:
  """Of negative numbers the magnitude counts down; its own inverse."""
  return jnp.where(words < 0, words ^ _ALL, words)


def _by_size(x: jax.Array, one: Any, two: Any, others: Any) -> Any:
  """One reduction on a GPU, or two of a small array; others elsewhere.

  XLA:GPU computes an operand again for each of two reductions, and for each
  array that it is seen as, or, where its cost model finds that to be too much,
  keeps it in float32.
  """
  gpu = one if x.size >= FEW else two
  return lax.platform_dependent(x, cpu=others, tpu=others, default=gpu)


def _told_by_words(
  size: jax.Array, signed: bool
) -> tuple[jax.Array, jax.Array]:
  """Floats, the least and the largest of whose words tell the ends.

  Of a huge value minus that, whose word is small; of what is no number -0.
  """
  usual = (size >= TINY) & (size <= (HUGE if signed else HUGE_SQUARE))
  low = high = jnp.where(usual, size, jnp.where(size < jnp.inf, -size, -0.0))
  if signed:  # huge values are larger than others anyway
    low = jnp.where(size < jnp.inf, size, -0.0)
  return jnp.where(size < TINY, jnp.inf, low), high


def _wider(a: jax.Array, b: jax.Array) -> jax.Array:
  """Of two pairs the smaller real and the larger imaginary part, as words."""
  low = jnp.minimum(*(_words(lax.real(x)) for x in (a, b)))
  high = jnp.maximum(*(_words(lax.imag(x)) for x in (a, b)))
  return lax.complex(_as_float(low), _as_float(high))


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
  """The larger key, with a sign where either has one."""
  return jnp.maximum(a & _ALL, b & _ALL) | ((a | b) & _SIGN)


def _words(x: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(x, jnp.int32)


def _as_float(words: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(words, jnp.float32)


def _reduce(
  pairwise: Callable[[jax.Array, jax.Array], jax.Array],
  start: np.int32,
  x: jax.Array,
  over: Over,
) -> jax.Array:
  """Reduces what is split already, on a CPU by halves.

  XLA:CPU takes the numbers of the last axis one at a time. Its halves, one
  beside the other, are compared many at a time.
  """

  def reduce(x):
    axes = tuple(axis % x.ndim for axis in over.axes)
    return over.kept(lax.reduce(x, start, pairwise, axes))

  def by_halves(x):
    # Not down to one: it would halve anew for each number that needs a scale,
    # where it does not repeat a reduction.
    while over.axes == (-1,) and x.shape[-1] and x.shape[-1] % 16 == 0:
      half = x.shape[-1] // 2
      x = pairwise(x[..., :half], x[..., half:])
    return reduce(x)

  return lax.platform_dependent(x, cpu=by_halves, default=reduce)
