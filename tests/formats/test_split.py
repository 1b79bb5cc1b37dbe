# SPDX-License-Identifier: Apache-2.0
"""Split, exhaustively: every high half beside the low halves that matter.

All expectations are NumPy integer arithmetic on words, and exact.
"""

import functools

import chex
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_mp import formats

LARGEST, INFINITY, NAN = 0x7F7FFFFF, 0x7F800000, 0x7FC00000
SIGN = 0x80000000


def grid(lows):
  """Words: all 65,536 high halves beside some low halves."""
  lows = np.unique(np.array(lows, np.uint32))
  high = np.arange(2**16, dtype=np.uint32)[:, None]
  return ((high << 16) | lows).ravel()


RANDOM = np.random.default_rng(0).integers(0, 2**16, 16)
# For 8 bits the same around each place where the low byte is cut off.
WORDS = {
  16: grid([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, *RANDOM]),
  8: grid(
    [0, 1, 0x7F, 0x80, 0x81, 0xFF, 0x100, 0x17F, 0x180, 0x181]
    + [0x7F7F, 0x7F80, 0x7F81, 0x7FFF, 0x8000, 0x807F, 0x8080, 0x8081]
    + [0xFE80, 0xFEFF, 0xFF00, 0xFF7F, 0xFF80, 0xFF81, 0xFFFF, *RANDOM]
  ),
}


@functools.partial(jax.jit, static_argnums=0)
def cut(format, words, key=None):
  """Words -> the words of `high`, and `low`: no float enters or leaves."""
  x = jax.lax.bitcast_convert_type(words, jnp.float32)
  high, low = format.encode(x, key)
  return jax.lax.bitcast_convert_type(high, jnp.uint16), low


@functools.partial(jax.jit, static_argnums=0)
def join(format, high, low):
  """The way back, into words."""
  stored = formats.HighLow(
    jax.lax.bitcast_convert_type(high, jnp.bfloat16), low
  )
  x = format.decode(stored, jax.ShapeDtypeStruct(high.shape, jnp.float32))
  return jax.lax.bitcast_convert_type(x, jnp.uint32)


def there_and_back(format, words, key=None):
  words = jnp.asarray(words, jnp.uint32)
  return np.asarray(join(format, *cut(format, words, key)))


def canonical(words):
  """Expected of a 16-bit residual: the word, NaN canonical."""
  words = np.asarray(words, np.uint32)
  return np.where((words & ~np.uint32(SIGN)) > INFINITY, np.uint32(NAN), words)


def rounded_to_24(words):
  """Expected of an 8-bit residual: nearest, ties to even, never infinite."""
  words = canonical(words).astype(np.uint64)
  keep, rest = words >> np.uint64(8), words & np.uint64(0xFF)
  up = (rest > 0x80) | ((rest == 0x80) & (keep % 2 == 1))
  keep = keep + up
  finite = (words & np.uint64(0x7FFFFFFF)) < INFINITY
  keep -= finite & ((keep & np.uint64(0x7FFFFF)) == INFINITY >> 8)
  return (keep << np.uint64(8)).astype(np.uint32)


EXPECTED = {16: canonical, 8: rounded_to_24}
both_widths = pytest.mark.parametrize('bits', [16, 8])


@both_widths
def test_round_trip_of_every_high_half(bits):
  words = WORDS[bits]
  chex.assert_trees_all_equal(
    there_and_back(formats.Split(bits), words), EXPECTED[bits](words)
  )


def test_exact_means_every_word_that_is_no_nan():
  words = WORDS[16]
  words = words[(words & ~np.uint32(SIGN)) <= INFINITY]
  chex.assert_trees_all_equal(there_and_back(formats.Split(16), words), words)


@both_widths
def test_halves_are_nearest_and_the_rest(bits):
  """`high` is to nearest, ties away from zero: half a place added, cut off."""
  high, low = cut(formats.Split(bits), WORDS[bits])
  word = EXPECTED[bits](WORDS[bits]).astype(np.uint64)
  nearest = (word + np.uint64(0x8000)) >> np.uint64(16)
  chex.assert_trees_all_equal(np.asarray(high), nearest.astype(np.uint16))
  rest = (word & np.uint64(0xFFFF)) >> np.uint64(16 - bits)
  chex.assert_trees_all_equal(np.asarray(low), rest.astype(low.dtype))
  chex.assert_type(low, {16: jnp.uint16, 8: jnp.uint8}[bits])


def test_no_bfloat16_is_nearer():
  """The same as distances, in float64, where they are exact."""
  words = WORDS[16]
  words = words[(words & ~np.uint32(SIGN)) < 0x7F000000]
  high = np.asarray(cut(formats.Split(16), words)[0], np.uint32)
  x = words.view(np.float32).astype(np.float64)

  def value(half):
    return (half.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

  distance = np.abs(value(high) - x)
  magnitude = high & 0x7FFF
  # Away from zero: of two as near, `high` is the larger.
  assert np.all(distance < np.abs(value(high + 1) - x))
  below = magnitude > 0
  assert np.all(distance[below] <= np.abs(value(high - 1) - x)[below])


@pytest.mark.parametrize('sign', [0, SIGN], ids=['plus', 'minus'])
@pytest.mark.parametrize(
  ('word', 'high', 'low'),
  [
    (0x00000000, 0x0000, 0x0000),
    (0x00000001, 0x0000, 0x0001),  # the smallest subnormal
    (0x00007FFF, 0x0000, 0x7FFF),
    (0x00008000, 0x0001, 0x8000),
    (0x0000FFFF, 0x0001, 0xFFFF),
    (0x007FFFFF, 0x0080, 0xFFFF),  # the largest subnormal shows as normal
    (0x3F800000, 0x3F80, 0x0000),
    (0x3F7FFFFF, 0x3F80, 0xFFFF),  # a carry into the next binade
    (0x3F808000, 0x3F81, 0x8000),  # ties: to even would give 0x3F80,
    (0x3FFD8000, 0x3FFE, 0x8000),  # and one pair for these two
    (0x3FFE8000, 0x3FFF, 0x8000),
    (0x7F7F7FFF, 0x7F7F, 0x7FFF),
    (0x7F7F8000, 0x7F80, 0x8000),  # shows as infinity, comes back finite
    (LARGEST, 0x7F80, 0xFFFF),
    (INFINITY, 0x7F80, 0x0000),
  ],
  ids=lambda x: f'{x:#x}',
)
def test_special_values(word, high, low, sign):
  words = np.array([sign | word], np.uint32)
  halves = cut(formats.Split(16), words)
  wanted = np.array([sign >> 16 | high]), np.array([low])
  chex.assert_trees_all_equal(halves, wanted)
  chex.assert_trees_all_equal(there_and_back(formats.Split(16), words), words)


@both_widths
@pytest.mark.parametrize(
  'word',
  [0x7FC00000, 0x7F800001, 0x7F807FFF, 0x7F808000, 0x7FFF7FFF, 0x7FFF8000]
  + [0x7FFFFFFF, 0xFFC00000, 0xFF800001, 0xFFFF8000, 0xFFFFFFFF],
  ids=hex,
)
def test_every_nan_is_the_canonical_one(word, bits):
  halves = cut(formats.Split(bits), np.array([word], np.uint32))
  chex.assert_trees_all_equal(halves, (np.array([NAN >> 16]), np.array([0])))
  assert there_and_back(formats.Split(bits), [word]) == NAN


@settings(max_examples=200, deadline=None, database=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([16, 8]))
def test_any_bits(word, bits):
  words = np.array([word], np.uint32)
  chex.assert_trees_all_equal(
    there_and_back(formats.Split(bits), words), EXPECTED[bits](words)
  )


def test_eight_bits_over_a_binade():
  """All 2^23 mantissas: in float32 ulps, 128 at most and 64 on average.

  128 ulps of 2^-23 are 2^-16 of the smallest value of the binade.
  """
  words = np.uint32(0x3F800000) + np.arange(2**23, dtype=np.uint32)
  seen = there_and_back(formats.Split(8), words)
  error = np.abs(seen.astype(np.int64) - words)
  assert error.max() == 128
  assert error.sum() == 64 * len(words)


def test_eight_bits_keep_every_24_bit_word():
  """All 2^24 of them, but NaN."""
  for start in range(0, 2**24, 2**22):
    words = np.arange(start, start + 2**22, dtype=np.uint32) << 8
    seen = there_and_back(formats.Split(8), words)
    chex.assert_trees_all_equal(seen, canonical(words))


@pytest.mark.parametrize('sign', [0, SIGN], ids=['plus', 'minus'])
@pytest.mark.parametrize('rounding', ['nearest', 'stochastic'])
def test_eight_bits_saturate(rounding, sign):
  """What rounds to infinity is the largest 24-bit word instead."""
  words = np.arange(LARGEST - 255, LARGEST + 1, dtype=np.uint32) | sign
  words = np.tile(words.astype(np.uint32), 64)
  seen = there_and_back(formats.Split(8, rounding), words, jax.random.key(0))
  chex.assert_trees_all_equal(seen, np.full_like(words, sign | 0x7F7FFF00))
  infinite = np.array([sign | INFINITY], np.uint32)
  seen = there_and_back(formats.Split(8, rounding), infinite, jax.random.key(0))
  chex.assert_trees_all_equal(seen, infinite)


def test_eight_bits_stochastic():
  """Up or down, and up as often as the low byte weighs.

  Statistical: of n draws, those up have a sigma of sqrt(n p (1 - p)).
  """
  n = 2**14
  low = np.arange(256, dtype=np.uint32)
  words = np.repeat(np.uint32(0xBF7FFF00) + low, n)
  format = formats.Split(8, 'stochastic')
  seen = there_and_back(format, words, jax.random.key(5))
  ups = (seen.reshape(256, n) - np.uint32(0xBF7FFF00)) >> 8
  assert set(np.unique(ups)) == {0, 1}
  p = low / 256
  assert np.all(np.abs(ups.sum(1) - n * p) <= 5 * np.sqrt(n * p * (1 - p)))


@both_widths
@pytest.mark.parametrize('sign', [0, 0x8000], ids=['plus', 'minus'])
def test_a_weight_set_to_zero_is_tiny_beside_any_residual(bits, sign):
  """Never a NaN: a carry that is not there is not borrowed."""
  low = np.arange(2**bits, dtype={16: np.uint16, 8: np.uint8}[bits])
  high = np.full_like(low, sign, np.uint16)
  seen = np.asarray(join(formats.Split(bits), high, low))
  wanted = (np.uint32(sign) << 16) | (low.astype(np.uint32) << (16 - bits))
  chex.assert_trees_all_equal(seen, wanted)
  assert np.all(np.abs(seen.view(np.float32).astype(np.float64)) < 2.0**-126)


@both_widths
@pytest.mark.parametrize('rounding', ['nearest', 'stochastic'])
def test_jit_gives_the_same_words(bits, rounding):
  format = formats.Split(bits, rounding)
  words = jnp.asarray(WORDS[bits])
  halves = cut(format, words, jax.random.key(0))
  seen = join(format, *halves)
  with jax.disable_jit():
    chex.assert_trees_all_equal(halves, cut(format, words, jax.random.key(0)))
    chex.assert_trees_all_equal(seen, join(format, *halves))


@pytest.mark.parametrize(
  ('arguments', 'name', 'got'),
  [
    ((7,), 'residual_bits', '7'),
    ((16.0,), 'residual_bits', '16.0'),
    ((True,), 'residual_bits', 'True'),
    ((None,), 'residual_bits', 'None'),
    ((8, 'even'), 'rounding', "'even'"),
    ((8, None), 'rounding', 'None'),
  ],
)
def test_wrong_arguments(arguments, name, got):
  with pytest.raises(ValueError, match=f'`{name}` must be one of .*got {got}'):
    formats.Split(*arguments)
