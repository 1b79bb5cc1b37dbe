# SPDX-License-Identifier: Apache-2.0
"""BlockInt: published tables, blocks and rows, the ends of grids.

Tables are made in float64 NumPy from their definitions, `tables.tree` and
`tables.codes`.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_mp import formats
from optax_mp.formats import _blocks
import tables

BLOCK = 128
# Eight units in the last place of a float32: the value of a code and the middle
# of two are computed with a few roundings.
ROUNDINGS = 2.0**-20
CODEBOOKS = [
  (bits, signed, map)
  for bits in (8, 4)
  for signed in (True, False)
  for map in ('dynamic', 'sqrt', 'softsign', 'linear')
] + [(8, True, 'sqrt_log')]
over_codebooks = pytest.mark.parametrize(('bits', 'signed', 'map'), CODEBOOKS)
both_widths = pytest.mark.parametrize('bits', [8, 4])


def codebook(bits, signed, map):
  """The values of all codes, in order."""
  top = 2 ** (bits - signed) - 1
  if map == 'dynamic':
    values = tables.tree(bits - 1, 1 if signed else 2)
    negative = -values[-2:0:-1]  # there is no -1
  elif map == 'linear' and top == 15:
    return tables.NO_ZERO[1:]
  else:
    values = tables.codes(map, top)
    negative = -values[:0:-1]
  return np.concatenate([negative, values]) if signed else values


@functools.partial(jax.jit, static_argnums=0)
def store(format, x, key=None):
  stored = format.encode(x, key)
  return stored, format.decode(stored, x)


def round_trip(format, x, key=None):
  return np.asarray(store(format, x, key)[1])


def ranks(format, x, key=None):
  """Codes, counted from the least of them."""
  codes = np.asarray(store(format, x, key)[0].codes).astype(np.int32)
  return codes - lowest_code(format)


def lowest_code(format):
  """What is stored of the least value of a codebook."""
  if format.signed and format.map != 'dynamic':
    return 1 - 2 ** (format.bits - 1)
  return int(jnp.iinfo(code_dtype(format)).min)


def code_dtype(format):
  x, key = jnp.ones(BLOCK), jax.random.key(0)
  return jax.eval_shape(format.encode, x, key).codes.dtype


def in_unit_blocks(values):
  """Blocks of 128, of which the largest is 1: values are in its units."""
  values = np.resize(values, (-(-len(values) // 127 // 8) * 8, 127))
  ones = np.ones((len(values), 1))
  return np.concatenate([values, ones], 1).astype(np.float32)


def dense(signed):
  """From 0 to 1 in equal steps, and in equal ratios from 1e-9 to 1."""
  x = np.concatenate([np.linspace(0, 1, 2**15), np.geomspace(1e-9, 1, 2**14)])
  return in_unit_blocks(np.concatenate([x, -x]) if signed else x)


def decode(format, codes, scales):
  """The values of codes that are counted from the least."""
  like = jax.ShapeDtypeStruct(codes.shape, jnp.float32)
  codes = jnp.asarray(codes + lowest_code(format), jnp.int32)
  codes = codes.astype(code_dtype(format))
  return np.asarray(format.decode(formats.Block(codes, scales), like))


@over_codebooks
def test_every_code_has_the_value_of_the_table(bits, signed, map):
  """Derived: eight roundings; the tables themselves have as many."""
  format = formats.BlockInt(bits, signed, map)
  table = codebook(bits, signed, map)
  codes = np.resize(np.arange(len(table)), (8, BLOCK))
  seen = decode(format, codes, jnp.ones((8, 1)))
  error = np.abs(seen.astype(np.float64) - table[codes])
  assert np.all(error <= ROUNDINGS * np.abs(table[codes]))


@over_codebooks
def test_codes_are_the_nearest_of_the_table(bits, signed, map):
  """Exact, but for values that are some roundings from the middle of two."""
  format = formats.BlockInt(bits, signed, map, keep_nonzero=False)
  x, table = dense(signed), codebook(bits, signed, map)
  middles = (table[1:] + table[:-1]) / 2
  nearest = np.searchsorted(middles, x.astype(np.float64))
  either = [
    np.searchsorted(middles, (x + way * ROUNDINGS * np.abs(x)))
    for way in (-1.0, 1.0)
  ]
  seen, tie = ranks(format, x), either[0] != either[1]
  chex.assert_trees_all_equal(seen[~tie], nearest[~tie].astype(np.int32))
  assert np.all((either[0] <= seen) & (seen <= either[1]))
  assert np.count_nonzero(tie) < x.size / 1000


@over_codebooks
def test_noise_takes_one_of_two_codes_and_is_fair(bits, signed, map):
  """Exact; and statistical: in bins, an error has a sigma of 1/2 or less."""
  format = formats.BlockInt(
    bits, signed, map, rounding='stochastic', keep_nonzero=False
  )
  x, table = dense(signed), codebook(bits, signed, map)
  seen = ranks(format, x, jax.random.key(0))
  margin, x = ROUNDINGS * np.abs(x), x.astype(np.float64)
  low = np.searchsorted(table, x - margin, 'right') - 1
  high = np.minimum(np.searchsorted(table, x + margin), len(table) - 1)
  assert np.all((np.maximum(low, 0) <= seen) & (seen <= high))
  inside = (low >= 0) & (high - low == 1)
  error = (table[seen] - x)[inside] / (table[high] - table[low])[inside]
  assert np.abs(error.sum()) <= 5 * 0.5 * np.sqrt(error.size)


def test_the_published_tables():
  """Exact as far as they are printed: bitsandbytes, low-bit-optimizers."""
  positive = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
  four = [-x for x in reversed(positive)] + [0.0, *positive, 1.0]
  np.testing.assert_allclose(codebook(4, True, 'dynamic'), four, rtol=2**-50)
  signed, unsigned = (codebook(8, sign, 'dynamic') for sign in (True, False))
  assert len(signed) == len(unsigned) == 256
  assert signed[127] == 0.0 and signed[255] == 1.0
  near_zero = [-0.99296875, 5.5e-7, 3.25e-6, 7.75e-6, 2.125e-5]
  np.testing.assert_allclose(signed[[0, 128, 129, 130, 131]], near_zero, 2**-50)
  ends = [3.25e-7, 0.9964843750]
  np.testing.assert_allclose(unsigned[[1, 254]], ends, rtol=2**-50)
  sixteenths = np.arange(1, 17) / 16
  chex.assert_trees_all_equal(codebook(4, False, 'linear'), sixteenths)


@pytest.mark.parametrize('map', ['dynamic', 'sqrt', 'softsign', 'linear'])
def test_what_is_not_zero_gets_the_first_code_at_least(map):
  """Exact; and it is `keep_nonzero` that does it."""
  x = dense(False)
  kept = ranks(formats.BlockInt(8, False, map), x)
  free = ranks(formats.BlockInt(8, False, map, keep_nonzero=False), x)
  chex.assert_trees_all_equal(kept, np.where(x > 0, np.maximum(free, 1), 0))
  assert np.any((free == 0) & (x > 0))


@pytest.mark.parametrize('map', ['sqrt', 'softsign', 'linear', 'dynamic'])
@both_widths
def test_the_largest_of_a_block_is_kept(bits, map):
  """Derived: roundings; whatever its size is, and with nothing beside it."""
  x = np.zeros((8, BLOCK), np.float32)
  x[np.arange(8), np.arange(8) * 16] = 10.0 ** np.arange(-35, 37, 9)
  seen = round_trip(formats.BlockInt(bits, map=map), x)
  assert np.all(np.abs(seen.astype(np.float64) - x) <= ROUNDINGS * x)


@pytest.mark.parametrize('signed', [True, False])
@both_widths
def test_an_empty_vector_is_stored(bits, signed):
  """Exact: and in no time; it has one group, of nothing."""
  seen = round_trip(formats.BlockInt(bits, signed), np.zeros(0, np.float32))
  assert seen.shape == (0,)


@pytest.mark.parametrize('signed', [True, False])
@both_widths
def test_what_is_no_normal_number_is_zero(bits, signed):
  """Exact: XLA flushes it, as all arithmetic does."""
  x = np.full((8, BLOCK), 0.5, np.float32)
  x[:, ::2] = 2.0**-127
  seen = round_trip(formats.BlockInt(bits, signed), x)
  assert not np.any(seen[:, ::2]) and np.all(seen[:, 1::2])


@pytest.mark.parametrize(
  ('map', 'size'),
  [('sqrt', 3e38), ('softsign', 3e38), ('linear', 3e38), ('linear', 1e-36)],
)
def test_scales_at_the_ends_of_float32(map, size):
  """Derived: half the widest bin; under jit a zero or 2^-126, it may be.

  Some versions of XLA multiply by 1 / 3e38 or by 1e-36 / 127: no normal number,
  so that it is flushed.
  """
  x = np.full((8, BLOCK), size, np.float32)
  format = formats.BlockInt(8, map=map)
  widest = np.diff(codebook(8, True, map)).max() / 2

  def near(seen):
    return np.abs(np.asarray(seen, np.float64) - x) <= widest * x

  assert np.all(near(format.decode(format.encode(x), x)))
  seen = round_trip(format, x)
  assert np.all(near(seen) | (seen == 0) | (seen == 2.0**-126))


@pytest.mark.parametrize('shape', [(64, 1024), (5, 1000), (3, 7, 500)])
@pytest.mark.parametrize(
  'format',
  [
    formats.BlockInt(8),
    formats.BlockInt(8, False),
    formats.BlockInt(4, False, 'linear', scale='rank1'),
  ],
  ids=['sqrt', 'log', 'rank1'],
)
def test_no_nan_is_passed_over(format, shape):
  """Exact: the maximum over an axis may, on a CPU, in arrays of some size."""
  x = np.ones(shape, np.float32)
  for bad in (np.nan, -np.nan):
    for at in (0, x.size // 2 + 1, x.size - 1):
      beside = x.copy()
      beside.flat[at] = bad
      assert np.isnan(round_trip(format, beside).flat[at])


@pytest.mark.parametrize(
  ('shape', 'scales'),
  [
    ((128,), (1,)),
    ((256,), (2,)),
    ((8, 128), (8, 1)),
    ((64, 1024), (64, 8)),
    ((3, 8, 256), (3, 8, 2)),
    # Rows, as no multiple of 128, or not of 8 rows.
    ((127,), ()),
    ((7, 130), (7,)),
    ((12, 128), (12,)),
    ((3, 7, 128), (3, 7)),
    # 16 values or more, of the trailing axes.
    ((100, 16), (100,)),
    ((40, 2, 9), (40,)),
    ((40, 3, 15), (40,)),
    ((20, 3), ()),
    ((5, 3, 4), ()),
    ((), ()),
    ((1,), ()),
    ((0, 4), ()),
    ((0, 128), (0, 1)),
    ((8, 0), ()),
  ],
  ids=str,
)
def test_blocks_or_rows(shape, scales):
  blocks = _blocks.cut(shape, BLOCK)
  assert blocks.scales == scales
  assert np.prod(blocks.view) == np.prod(shape)
  groups = [blocks.view[axis] for axis in blocks.axes]
  assert np.prod(groups, dtype=int) * np.prod(scales) == np.prod(shape)
  stored = jax.eval_shape(formats.BlockInt().encode, jnp.zeros(shape))
  chex.assert_shape(stored, [shape, scales])


@pytest.mark.parametrize('size', [2, 32, 96, np.int64(256)])
def test_blocks_of_another_size(size):
  """Exact: what one block holds does not move another."""
  format = formats.BlockInt(8, block_size=size)
  x = np.random.default_rng(0).standard_normal((8, 2 * size)).astype('f4')
  other = np.concatenate([x[:, :size], 1e3 * x[:, size:]], 1)
  stored, seen = store(format, x)
  chex.assert_shape(stored.scales, (8, 2))
  moved = round_trip(format, other)
  chex.assert_trees_all_equal(moved[:, :size], np.asarray(seen)[:, :size])


@pytest.mark.parametrize(
  ('shape', 'note'),
  [
    ((64, 1024), ''),
    ((256,), ''),
    ((), ''),
    ((127,), 'one scale for 127 values: 127 is no multiple of 128'),
    ((4096, 8), 'one scale a row: 8 is no multiple of 128'),
    ((4096, 2), 'one scale for 8192 values: 2 is no multiple of 128'),
    ((64, 3, 3), 'one scale for 576 values: 3 is no multiple of 128'),
    ((64, 64, 3, 3), 'one scale for 576 values: 3 is no multiple of 128'),
    ((8, 130), 'one scale a row: 130 is no multiple of 128'),
    ((12, 128), 'one scale a row: 12 is no multiple of 8'),
  ],
  ids=str,
)
def test_the_plan_says_why_an_array_has_rows(shape, note):
  assert formats.BlockInt().note(shape) == note
  rank1 = formats.BlockInt(4, False, 'linear', scale='rank1')
  assert rank1.note(shape) == (note if len(shape) < 2 else '')


@pytest.mark.parametrize('shape', [(6, 10), (3, 4, 5)], ids=str)
def test_rank_one_takes_the_smallest_of_the_largest(shape):
  """Exact: what is that for its row, column, ... comes back as it is."""
  format = formats.BlockInt(4, False, 'linear', scale='rank1')
  x = np.random.default_rng(0).uniform(0.1, 1, shape).astype(np.float32)
  stored, _ = store(format, x)
  axes = range(x.ndim)
  largest = [x.max(tuple(set(axes) - {axis})) for axis in axes]
  chex.assert_trees_all_equal(stored.scales, tuple(largest))
  scale = functools.reduce(np.minimum, np.ix_(*largest))
  chex.assert_trees_all_equal(round_trip(format, scale), scale)
  error = np.abs(round_trip(format, x) - x)
  assert np.all(error <= (1 + ROUNDINGS) * scale / 32)


def test_rank_one_of_a_vector_has_blocks():
  stored = jax.eval_shape(
    formats.BlockInt(4, False, 'linear', scale='rank1').encode, jnp.zeros(256)
  )
  chex.assert_shape(stored, [(256,), (2,)])


def log_blocks():
  """Blocks of 2 to 60 octaves, their values in any order."""
  x = 2.0 ** -np.random.default_rng(0).uniform(0, 1, (8, BLOCK))
  return (x ** np.linspace(2, 60, 8)[:, None]).astype(np.float32)


def test_logarithms_use_all_codes():
  """Exact: the first code is the smallest value, the last one the largest."""
  x = log_blocks()
  codes = ranks(formats.BlockInt(4, False), x)
  assert np.all(codes[x == x.min(1, keepdims=True)] == 1)
  assert np.all(codes[x == x.max(1, keepdims=True)] == 15)


def test_octaves_use_most_codes():
  """Derived: a size may leave a fifth of 254; they begin with an octave."""
  x = log_blocks()
  format = formats.BlockInt(8, False)
  codes = ranks(format, x)
  assert np.all(codes.max(1) >= 254 * 4 / 5)
  above = tables.log_word(x.min(1)) / 2.0**23 % 1
  steps = above * octaves_of(format)
  within = np.log2(x.max(1) / x.min(1)) < 40
  assert 0 < np.sum(within) < len(x)
  first = np.where(within, 1 + steps, 1)
  assert np.all(np.abs(codes.min(1) - first) < 0.5 + 2**-8)


def octaves_of(format):
  """How many steps an octave has in each of `log_blocks`."""
  words = tables.log_word(values_of_codes(format)[:, 1:])
  return np.round(2.0**23 / np.diff(words, axis=1).mean(1))


def values_of_codes(format):
  """Every code's value, a block a row."""
  stored, _ = store(format, log_blocks())
  halves = np.split(np.arange(2**format.bits), max(2**format.bits // BLOCK, 1))
  decoded = [
    decode(format, np.tile(np.resize(half, BLOCK), (8, 1)), stored.scales)
    for half in halves
  ]
  return np.concatenate(decoded, axis=1)[:, : 2**format.bits]


@both_widths
def test_logarithms_have_equal_steps(bits):
  """Exact, but for the rounding of a word, and of float32's position in it."""
  values = values_of_codes(formats.BlockInt(bits, False))
  assert not np.any(values[:, 0])
  words = tables.log_word(values[:, 1:])
  steps = np.diff(words, axis=1)
  assert np.all(np.ptp(steps, axis=1) <= word_error(words)[:, 0])
  assert np.all(steps > 0)


def word_error(words):
  """Of a logarithm: steps have 20 bits; value and root are rounded."""
  return 4 + 2.0**-20 * (2.0**23 + np.ptp(words, axis=1, keepdims=True))


def test_octaves_have_whole_numbers_of_steps():
  """Exact, as above: so many codes on, a value is twice as large."""
  for values in values_of_codes(formats.BlockInt(8, False))[:, 1:]:
    words = tables.log_word(values)
    steps = 2.0**23 / np.diff(words).mean()
    n = round(steps)
    assert abs(steps - n) < 2**-19 * n
    away = words[n:] - words[:-n] - 2.0**23
    assert np.all(np.abs(away) <= word_error(words[None]))


def test_octaves_do_not_move_with_the_ends():
  """Exact, as above: what is on the grid stays there when the ends shrink.

  Of a grid between the ends, every value would be rounded again.
  """
  format = formats.BlockInt(8, False)
  stored, once = store(format, log_blocks())
  ends = (once == once.min(1, keepdims=True)) | (
    once == once.max(1, keepdims=True)
  )
  shrunk = np.where(ends, once * np.float32(0.995), once)
  again, twice = store(format, shrunk)
  n, m = (np.asarray(s.scales & 0x7FFFFF)[:, 0] for s in (stored, again))
  same = (n == m)[:, None] & ~ends
  assert np.mean(same) > 0.5
  logs, moved = (tables.log_word(np.asarray(x)) for x in (once, twice))
  assert np.all((np.abs(moved - logs) <= word_error(logs))[same])


@both_widths
def test_values_on_the_grid_stay_there(bits):
  """Exact: while its ends stay, a block has its grid, wherever values move."""
  format = formats.BlockInt(bits, False)
  stored, once = store(format, log_blocks())
  moved = np.roll(once, 1, 1)
  again, twice = store(format, moved)
  same = np.asarray(stored.scales == again.scales)[:, 0]
  assert np.any(same)
  chex.assert_trees_all_equal(np.asarray(twice)[same], moved[same])


@pytest.mark.parametrize(('bits', 'digits'), [(8, 10), (4, 13)])
def test_equal_values_have_ten_bits_or_more(bits, digits):
  """Derived: half a step of 1/512 octave, or to what the ends are rounded."""
  x = (
    np.full((8, BLOCK), 0.3, np.float32) * np.arange(1, 9, dtype='f4')[:, None]
  )
  seen = round_trip(formats.BlockInt(bits, False), x)
  assert np.all(np.abs(seen.astype(np.float64) - x) <= 2.0**-digits * x)


@both_widths
def test_logarithms_of_all_numbers(bits):
  """Exact: a block of all sizes is finite, has its zeros and no others."""
  x = np.geomspace(2.0**-126, 3.4e38, BLOCK - 1).astype(np.float32)
  x = np.tile(np.append(x, np.float32(0)), (8, 1))
  seen = round_trip(formats.BlockInt(bits, False), x)
  chex.assert_tree_all_finite(seen)
  chex.assert_trees_all_equal(seen > 0, x > 0)
  assert np.all(np.diff(seen[:, :-1]) >= 0)


def test_the_map_has_a_default():
  assert formats.BlockInt() == formats.BlockInt(8, map='sqrt')
  assert formats.BlockInt(4, False) == formats.BlockInt(4, False, 'log')
  assert hash(formats.BlockInt()) == hash(formats.BlockInt(8, map='sqrt'))


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'bits': 3}, '`bits` must be one of (8, 4); got 3.'),
    ({'bits': 8.0}, '`bits` must be one of (8, 4); got 8.0.'),
    ({'bits': True}, '`bits` must be one of (8, 4); got True.'),
    ({'map': 'cubic'}, "`map` must be one of ('sqrt', 'sqrt_log', "),
    ({'map': 3}, '`map` must be one of'),
    (
      {'map': 'sqrt_log', 'bits': 4},
      "8 bits with signs; got bits=4, signed=True. Use map='softsign' for 4",
    ),
    ({'map': 'sqrt_log', 'signed': False}, 'got bits=8, signed=False.'),
    ({'map': 'log'}, "`map='log'` is for unsigned values with a grid a block"),
    (
      {'signed': False, 'scale': 'rank1'},
      "got signed=False, scale='rank1'. Use signed=False and scale='block'",
    ),
    ({'scale': 'row'}, "`scale` must be one of ('block', 'rank1'); got 'row'."),
    ({'rounding': None}, '`rounding` must be one of'),
    ({'block_size': 1}, '`block_size` must be an integer, 2 or more; got 1.'),
    ({'block_size': 128.0}, '`block_size` must be an integer, 2 or more'),
    ({'block_size': True}, '`block_size` must be an integer, 2 or more'),
    ({'block_size': jnp.int32(128)}, '`block_size` must be a Python value'),
    ({'bits': jnp.int32(8)}, '`bits` must be a Python value'),
  ],
  ids=str,
)
def test_wrong_arguments(arguments, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    formats.BlockInt(**arguments)


def test_only_small_codes_are_rounded_stochastically():
  """Exact: from code 10 on the nearer one, below it both."""
  x = np.linspace(0, 1, 64 * BLOCK, dtype=np.float32).reshape(64, BLOCK)
  x[:, 0] = 1.0
  below = formats.BlockInt(8, rounding='stochastic', stochastic_below=10)
  keys = jax.random.split(jax.random.key(0), 20)
  codes = np.stack([below.encode(x, key).codes for key in keys])
  nearest = np.asarray(formats.BlockInt(8).encode(x).codes)
  small = np.floor(127 * np.sqrt(x)) < 10
  assert np.all((codes == nearest) | small)
  assert np.mean((codes != nearest)[:, small]) > 0.1


@pytest.mark.parametrize(
  'settings',
  [
    {'stochastic_below': 10},
    {'stochastic_below': 0, 'rounding': 'stochastic'},
    {'stochastic_below': 1.5, 'rounding': 'stochastic'},
    {'stochastic_below': 9, 'rounding': 'stochastic', 'map': 'dynamic'},
    {'stochastic_below': 9, 'rounding': 'stochastic', 'signed': False},
  ],
)
def test_stochastic_below_must_make_sense(settings):
  with pytest.raises(ValueError, match='`stochastic_below` must be a positive'):
    formats.BlockInt(8, **settings)
