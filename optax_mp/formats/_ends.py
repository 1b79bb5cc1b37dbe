# SPDX-License-Identifier: Apache-2.0
"""The smallest and the largest of the values that share a scale.

An overflow must cost only the value that overflowed. The smallest and the
largest value of a block, its *ends*, are therefore found among its usual
values:

* Infinities and NaNs are left out.
* *Huge* values are left out as well. A value is huge if it is above 2^48, or
  2^96 in an unsigned array, and its block also has values below that limit that
  are not zero. It is taken for the result of an overflow. If all other values
  of the block are zeros or as large, it is a usual value.

A block is *marked* if it has an infinity, a NaN or, in an unsigned array, a
huge value. The last codes of a marked block stand for these values. Formats
differ in their mark: it is the sign of the scale, a bit, or a number that means
nothing else.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from optax_mp.formats import _reductions

# A gradient above 2^64 has an infinite square, and a first moment above 2^48
# even with decay 0.9999, which adds 1e-4 of the gradient. A second moment is
# above 2^96 only after a gradient above 2^48; with decay 0.9999, above 2^54.
HUGE = 2.0**48
HUGE_SQUARE = HUGE**2
# In an unsigned array, a huge value is decoded to this one. An optimizer
# divides by its root, so it must be large. After the optimizer's decay it is
# still huge, so it stays at 2^120; in float32 it would decay.
OUTLIER = 2.0**120
LARGEST = float(np.finfo(np.float32).max)
TINY = 2.0**-126  # the smallest normal number; below it a value counts as zero
# The smallest scale of a marked block. XLA may divide it by the largest code or
# number, up to 57344, before it multiplies by a code, and the mark must not be
# lost in an underflow.
LEAST = 2.0**-108

# Words (bit patterns) of float32, and the parts of the keys by which `largest`
# compares them.
_SIGN = np.int32(-(2**31))
_ALL = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_NORMAL = np.int32(0x00800000)
_NONE = np.int32(0)
_HUGE = np.float32(HUGE).view(np.int32)
_RAISED = _ALL - _HUGE

_words, _as_float = _reductions.words, _reductions.as_float


class Ends(NamedTuple):
  """The ends of each block, whose own axes are reduced."""

  # The smallest value that is not zero; infinity in a block of zeros. TINY in a
  # marked block, where the reduction finds the mark instead.
  low: jax.Array
  high: jax.Array  # the largest value: below TINY in a block of zeros
  marked: jax.Array  # whether the block is marked


def largest(
  x: jax.Array, over: _reductions.Over
) -> tuple[jax.Array, jax.Array]:
  """The largest usual magnitude of each block, and which blocks are marked.

  For signed arrays. A huge value does not mark its block: formats store it as
  the largest usual one, with its sign.

  On a TPU, and for large leaves on a GPU, this is one reduction of integer
  keys, in the order zero, huge, usual; a negative key stands for an infinity or
  a NaN. Elsewhere two reductions are needed.

  Args:
    x: float32.
    over: which values share a scale.

  Returns:
    The magnitudes, 0 in a block of zeros, and the marks.
  """

  def in_one(x):
    words = _words(x) & _ALL
    keys = jnp.where(words <= _HUGE, words + _RAISED, words - _HUGE)
    keys = jnp.where(words < _NORMAL, 0, keys)
    keys = jnp.where(words < _INFINITY, keys, _SIGN)
    keys = _reductions.reduce_own(_larger, _NONE, over.split(keys), over)
    marked, keys = keys < 0, keys & _ALL
    huge = jnp.where(keys > 0, keys + _HUGE, 0)
    words = jnp.where(keys >= _RAISED + _NORMAL, keys - _RAISED, huge)
    return _as_float(words), marked

  def apart(x):
    x = jnp.abs(over.split(x))
    _, high = _told_by_words(x, signed=True)
    high = _reductions.reduce(jnp.maximum, _SIGN, _words(high), over)
    no_number = (~(x < jnp.inf)).astype(jnp.int32)
    marked = _reductions.reduce(jnp.maximum, _NONE, no_number, over)
    high = high & _ALL
    return _as_float(jnp.where(high < _NORMAL, 0, high)), marked > 0

  return _reductions.by_size(x, one=in_one, two=apart, tpu=in_one)


def range_of(size: jax.Array, over: _reductions.Over, signed: bool) -> Ends:
  """The smallest and the largest usual value of each block, zeros left out.

  Args:
    size: float32; magnitudes if ``signed``, else a negative value counts as a
      NaN.
    over: which values share a scale.
    signed: whether the array has signs. If so, huge values begin at 2^48 and
      mark no block, as for :func:`largest`. If not, they begin at 2^96 and mark
      their block: a code is reserved for them.

  Returns:
    The ends.
  """
  if not signed:
    size = jnp.where(size <= -TINY, jnp.nan, size)

  def in_pairs(size):
    # The pairs are viewed as blocks, not made of two views: XLA:GPU would count
    # the moment as used twice.
    pairs = over.split(lax.complex(*_told_by_words(size, signed)))
    start = np.complex64(complex(np.inf, -0.0))
    pairs = _reductions.reduce_own(_wider, start, pairs, over)
    return _words(lax.real(pairs)), _words(lax.imag(pairs))

  def apart(size):
    low, high = map(_words, _told_by_words(over.split(size), signed))
    low = _reductions.reduce(jnp.minimum, _INFINITY, low, over)
    return low, _reductions.reduce(jnp.maximum, _SIGN, high, over)

  low, high = _reductions.by_size(size, one=in_pairs, two=apart, tpu=apart)
  # The words of huge values are negative; -0, which stands for values that are
  # no numbers, has the least of all words.
  no_number = low == _SIGN
  marked = no_number | ((low < 0) & (high > 0))
  low = jnp.where(marked, _NORMAL, low & _ALL)
  return Ends(_as_float(low), _as_float(high & _ALL), marked)


def both(
  x: jax.Array, over: _reductions.Over
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The smallest and the largest usual value of each block, with their signs.

  Args:
    x: float32.
    over: which values share a scale.

  Returns:
    Both, 0 where a block has no number, and which blocks are marked.
  """
  x = over.split(x)
  over = _reductions.Over(over.axes)
  size, marked = largest(x, over)
  limit = jnp.where(size <= HUGE, HUGE, LARGEST)
  inside = jnp.abs(x) <= jnp.expand_dims(limit, over.axes)
  # Integers in the order of the numbers; the last one for values left out.
  words = _in_order(_words(x))
  low = _reductions.reduce(
    jnp.minimum, _ALL, jnp.where(inside, words, _ALL), over
  )
  high = _reductions.reduce(
    jnp.maximum, -_ALL, jnp.where(inside, words, -_ALL), over
  )
  low, high = (
    jnp.where(abs(end) == _ALL, 0.0, _as_float(_in_order(end)))
    for end in (low, high)
  )
  return low, high, marked


def _in_order(words: jax.Array) -> jax.Array:
  """Words of float32 to integers in the order of the numbers, and back.

  The words of negative numbers count their magnitude upwards.
  """
  return jnp.where(words < 0, words ^ _ALL, words)


def _told_by_words(
  size: jax.Array, signed: bool
) -> tuple[jax.Array, jax.Array]:
  """Two arrays of floats whose words, compared as integers, give the ends.

  A huge value is negated in them, so that its word is below that of each usual
  value; an infinity or a NaN becomes -0, the least of all words.

  Returns:
    One whose smallest words are looked for, and one for the largest.
  """
  usual = (size >= TINY) & (size <= (HUGE if signed else HUGE_SQUARE))
  others = jnp.where(size < jnp.inf, -jnp.abs(size), -0.0)
  low = high = jnp.where(usual, size, others)
  if signed:  # huge values are larger than others anyway
    low = jnp.where(size < jnp.inf, size, -0.0)
  return jnp.where(size < TINY, jnp.inf, low), high


def _wider(a: jax.Array, b: jax.Array) -> jax.Array:
  """The smaller real and the larger imaginary part, compared as words."""
  low = jnp.minimum(*(_words(lax.real(x)) for x in (a, b)))
  high = jnp.maximum(*(_words(lax.imag(x)) for x in (a, b)))
  return lax.complex(_as_float(low), _as_float(high))


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
  """The larger key, with a sign where either has one."""
  return jnp.maximum(a & _ALL, b & _ALL) | ((a | b) & _SIGN)
