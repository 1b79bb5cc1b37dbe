# SPDX-License-Identifier: Apache-2.0
"""Rounding on bits against exact oracles, and the noise against chance.

Statistical tolerances are 5 sigma of the estimate, at fixed keys.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from optax_mp.formats import _rounding

N = 2**20
RAW_KEYS = [(0, 0), (0, 1), (1, 0), (0xDEADBEEF, 0x12345678)]
over_keys = pytest.mark.parametrize('raw', RAW_KEYS, ids=str)


@functools.cache
def noise(raw, shape=(N,)):
  key = jnp.array(raw, jnp.uint32)
  return np.asarray(
    jax.jit(_rounding.random_bits, static_argnums=1)(key, shape)
  )


def assert_independent(a, b):
  """No correlation of values, and of equal bits as many as by chance.

  A correlation of n pairs has a sigma of 1 / sqrt(n), a share of bits one of
  1 / (2 sqrt(n)).
  """
  n = a.size
  assert np.abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) <= 5 / np.sqrt(n)
  assert_balanced(a ^ b)


def assert_balanced(words):
  for bit in range(32):
    share = ((words >> np.uint32(bit)) & 1).mean()
    assert abs(share - 0.5) <= 5 * 0.5 / np.sqrt(words.size), bit


@over_keys
def test_noise_is_uniform(raw):
  u = noise(raw) / 2.0**32
  # Of a uniform variable the variance is 1/12, the fourth moment 1/80.
  assert abs(u.mean() - 0.5) <= 5 * np.sqrt(1 / 12 / N)
  variance = np.mean((u - 0.5) ** 2)
  assert abs(variance - 1 / 12) <= 5 * np.sqrt((1 / 80 - 1 / 144) / N)
  assert_balanced(noise(raw))


@over_keys
@pytest.mark.parametrize('shift', [0, 12, 24], ids='bits-from-{}'.format)
def test_bytes_are_equally_frequent(raw, shift):
  """Chi square over 256 bins has a mean of 255 and a variance of 2 x 255."""
  counts = np.bincount((noise(raw) >> np.uint32(shift)) & 0xFF, minlength=256)
  chi_square = np.sum((counts - N / 256) ** 2) / (N / 256)
  assert abs(chi_square - 255) <= 5 * np.sqrt(2 * 255)


@over_keys
@pytest.mark.parametrize('lag', [1, 2, 128, 1024])
def test_neighbours_are_independent(raw, lag):
  words = noise(raw)
  assert_independent(words[lag:], words[:-lag])


@over_keys
def test_noise_takes_no_value_twice(raw):
  """Exact: for one key it is a bijection of the position."""
  assert np.all(np.diff(np.sort(noise(raw))) > 0)


@pytest.mark.parametrize('other', [(0, 1), (1, 0), (1, 1), (0, 2**31)], ids=str)
def test_keys_are_independent(other):
  assert_independent(noise((0, 0)), noise(other))


def test_either_word_of_the_key_counts():
  assert_independent(noise((3, 5)), noise((5, 3)))
  assert_independent(noise((3, 5)), noise((3, 3)))
  assert_independent(noise((3, 5)), noise((5, 5)))


@pytest.mark.parametrize('word', [0, 1])
def test_consecutive_keys_at_one_position(word):
  """As a step counter or a leaf's number would make them."""
  count = jnp.arange(2**16, dtype=jnp.uint32)
  rest = jnp.full_like(count, 7)
  keys = jnp.stack((count, rest) if word == 0 else (rest, count), -1)
  draw = jax.jit(jax.vmap(lambda key: _rounding.random_bits(key, (4,))))
  words = np.asarray(draw(keys))
  assert_balanced(words)
  assert_independent(words[1:], words[:-1])
  assert_independent(words[:, 0], words[:, 1])


def test_keys_that_jax_splits_are_independent():
  keys = jax.random.key_data(jax.random.split(jax.random.key(0), 3))
  first, second, third = (noise(tuple(np.asarray(key))) for key in keys)
  assert_independent(first, second)
  assert_independent(second, third)


@pytest.mark.parametrize('impl', ['threefry2x32', 'rbg'])
def test_typed_and_raw_keys_agree(impl):
  """Also where a key has four words."""
  key = jax.random.key(42, impl=impl)
  typed = _rounding.random_bits(key, (5, 7))
  raw = _rounding.random_bits(jax.random.key_data(key), (5, 7))
  plain = _rounding.random_bits(np.asarray(jax.random.key_data(key)), (5, 7))
  chex.assert_trees_all_equal(typed, raw, plain)
  chex.assert_type(typed, jnp.uint32)


@pytest.mark.parametrize(
  'shape', [(), (1,), (0,), (0, 4), (7,), (3, 5), (2, 3, 4), (2, 1, 3, 2)]
)
def test_position_is_row_major(shape):
  """Exact: every axis counts, so no row repeats another's noise."""
  wanted = np.arange(np.prod(shape, dtype=int), dtype=np.uint32).reshape(shape)
  chex.assert_trees_all_equal(_rounding._position(shape), wanted)
  flat = noise((1, 2), (wanted.size,)).reshape(shape)
  chex.assert_trees_all_equal(noise((1, 2), shape), flat)


def test_position_of_a_huge_array_wraps():
  """Shapes only: strides of 2^32 and more are taken modulo 2^32."""
  shape = (2, 2**16, 2**17)
  seen = jax.eval_shape(lambda: _rounding._position(shape))
  chex.assert_shape(seen, shape)


@pytest.mark.parametrize(
  ('spec', 'shape'),
  [
    (PartitionSpec('a', 'b'), (16, 24)),
    (PartitionSpec('b', None), (16, 24)),
    (PartitionSpec(None, ('a', 'b')), (5, 16)),
    (PartitionSpec(None, 'a', 'b'), (3, 8, 6)),
    (PartitionSpec(('a', 'b')), (64,)),
  ],
  ids=str,
)
def test_noise_is_the_same_on_eight_devices(spec, shape):
  if jax.device_count() < 8:
    pytest.skip('needs 8 devices')
  mesh = jax.make_mesh(
    (4, 2), ('a', 'b'), axis_types=(AxisType.Auto, AxisType.Auto)
  )
  sharding = NamedSharding(mesh, spec)
  draw = jax.jit(
    lambda key: _rounding.random_bits(key, shape), out_shardings=sharding
  )
  cut = draw(jnp.array([1, 2], jnp.uint32))
  assert cut.sharding.is_equivalent_to(sharding, len(shape))
  chex.assert_trees_all_equal(np.asarray(cut), noise((1, 2), shape))


def test_uniform_is_below_one():
  """Exact: multiples of 2^-24, of which float32 rounds none up to 1."""
  words = np.array([0, 0xFF, 0x100, 0x80000000, 0xFFFFFFFF], np.uint32)
  wanted = np.array([0, 0, 2.0**-24, 0.5, 1 - 2.0**-24], np.float32)
  chex.assert_trees_all_equal(_rounding.uniform(jnp.asarray(words)), wanted)


def finite_words(drop):
  """Words up to infinity, of either sign, around the places of rounding."""
  half = 2 ** (drop - 1)
  low = [0, 1, half - 1, half, half + 1, 2 * half - 1]
  high = np.arange(0, 0x7F800000, 2**drop * 97, dtype=np.uint32)
  words = np.append((high[:, None] | np.array(low, np.uint32)), 0x7F800000)
  return np.concatenate([words, words | 0x80000000]).astype(np.uint32)


@pytest.mark.parametrize('drop', [8, 16])
def test_round_nearest(drop):
  """Exact, against 64-bit integers: ties to even."""
  words = finite_words(drop)
  seen = np.asarray(_rounding.round_nearest(jnp.asarray(words), drop))
  keep, rest = np.divmod(words.astype(np.uint64), np.uint64(2**drop))
  tie = rest == 2 ** (drop - 1)
  up = (rest > 2 ** (drop - 1)) | (tie & (keep % 2 == 1))
  chex.assert_trees_all_equal(seen, (keep + up).astype(np.uint32))


def test_round_nearest_to_bfloat16_is_the_cast():
  words = finite_words(16)
  seen = _rounding.round_nearest(jnp.asarray(words), 16)
  normal = (words & 0x7FFFFFFF) >= 0x00800000  # XLA may flush the others
  cast = np.asarray(jnp.asarray(words.view(np.float32)).astype(jnp.bfloat16))
  chex.assert_trees_all_equal(
    np.asarray(seen)[normal].astype(np.uint16), cast.view(np.uint16)[normal]
  )


@pytest.mark.parametrize('drop', [8, 16])
@pytest.mark.parametrize('draw', [0, 1, 0x80000000, 0xFFFFFFFF], ids=hex)
def test_round_stochastic_fixed_points(drop, draw):
  """Exact: whatever the noise, a word that fits stays, infinity as well."""
  keep = np.unique(finite_words(drop) >> np.uint32(drop))
  words = jnp.asarray(keep << np.uint32(drop))
  noise = jnp.full_like(words, draw)
  seen = _rounding.round_stochastic(words, drop, noise)
  chex.assert_trees_all_equal(np.asarray(seen), keep)


@pytest.mark.parametrize(('drop', 'every'), [(8, 1), (16, 1021)])
def test_round_stochastic_goes_up_as_often_as_the_rest_weighs(drop, every):
  """Exact: over all values the noise can take, not 'about'."""
  rest = np.arange(0, 2**drop, every, dtype=np.uint32)[:, None]
  keep = np.uint32(0x3F7FFFFF >> drop)  # so that up is the next binade
  draws = np.arange(2**drop, dtype=np.uint32)[None] << np.uint32(32 - drop)
  # The noise's own low bits must not count.
  draws = draws | np.uint32(2 ** (32 - drop) - 1)
  words = (keep << np.uint32(drop)) | rest
  shape = np.broadcast_shapes(words.shape, draws.shape)
  seen = _rounding.round_stochastic(
    jnp.broadcast_to(words, shape), drop, jnp.broadcast_to(draws, shape)
  )
  ups = np.asarray(seen - keep)
  assert ups.max() == 1
  chex.assert_trees_all_equal(ups.sum(1), rest[:, 0].astype(ups.sum(1).dtype))


def test_words_and_back():
  words = finite_words(16)
  x = jax.lax.bitcast_convert_type(jnp.asarray(words), jnp.float32)
  chex.assert_trees_all_equal(np.asarray(_rounding.to_bits(x)), words)
  again = jax.lax.bitcast_convert_type(_rounding.from_bits(words), jnp.uint32)
  chex.assert_trees_all_equal(np.asarray(again), words)
  infinite = (words & 0x7FFFFFFF) == 0x7F800000
  chex.assert_trees_all_equal(
    np.asarray(_rounding.is_infinite(words)), infinite
  )


def test_to_bits_makes_every_nan_canonical():
  fraction = np.append(2 ** np.arange(23, dtype=np.uint32), 0x7FFFFF)
  words = np.concatenate([fraction | 0x7F800000, fraction | 0xFF800000])
  x = jax.lax.bitcast_convert_type(
    jnp.asarray(words.astype(np.uint32)), jnp.float32
  )
  wanted = np.full(len(words), 0x7FC00000, np.uint32)
  chex.assert_trees_all_equal(np.asarray(_rounding.to_bits(x)), wanted)


def test_halves_and_back():
  """Exact, all 65,536: bfloat16 is widened by a shift, NaN payloads too."""
  words = jnp.arange(2**16, dtype=jnp.uint32)
  for dtype in (jnp.bfloat16, jnp.float16):
    half = _rounding.to_half(words, dtype)
    chex.assert_type(half, dtype)
    chex.assert_trees_all_equal(_rounding.half_bits(half), words)
  wide = _rounding.widen(_rounding.to_half(words))
  chex.assert_trees_all_equal(
    jax.lax.bitcast_convert_type(wide, jnp.uint32), words << 16
  )
