# SPDX-License-Identifier: Apache-2.0
"""Codes are those of the published tables, made here from their definitions."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from optax_mp import formats


def dynamic(signed, decades, bits):
  """Decade i of `decades`: cell midpoints of a linear split of [0.1, 1]."""
  values = []
  for i in range(decades):
    cells = 2 ** (i if signed else i + 1)
    middles = 0.1 + 0.9 * (np.arange(cells) + 0.5) / cells
    values += list(10.0 ** (i + 1 - decades) * middles)
  values += [0.0, 1.0] + ([-x for x in values] if signed else [])
  assert len(set(values)) == 2**bits
  return np.sort(np.array(values))


SIGNED_4 = np.array(
  [-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0.0]
  + [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0]
)
TABLES = {
  'dynamic, signed': (
    formats.BlockInt(8, map='dynamic', keep_nonzero=False),
    dynamic(True, 7, 8),
  ),
  'dynamic, unsigned': (
    formats.BlockInt(8, False, 'dynamic', keep_nonzero=False),
    dynamic(False, 7, 8),
  ),
  'dynamic, 4 bits': (formats.BlockInt(4, map='dynamic'), SIGNED_4),
  'linear, 4 bits': (
    formats.BlockInt(4, False, 'linear'),
    np.arange(1, 17) / 16,
  ),
}
over_tables = pytest.mark.parametrize(
  ('format', 'table'), TABLES.values(), ids=TABLES
)
# Values in a block are relative to its largest: that of each is 1.
BLOCK = formats.BlockInt().block_size


def with_unit_scale(values):
  """Blocks of one 1.0 and 127 values."""
  values = np.resize(values, (-(-len(values) // (BLOCK - 1)), BLOCK - 1))
  ones = np.ones((len(values), 1))
  return np.concatenate([ones, values], 1).astype(np.float32).ravel()


def test_the_4_bit_tree_is_the_published_one():
  """Exact, up to a rounding of float64."""
  np.testing.assert_allclose(dynamic(True, 3, 4), SIGNED_4, rtol=2**-50)


@over_tables
def test_codes_decode_to_the_table(format, table):
  """Claim: entry by entry, within 1e-6 of the value."""
  dtype = format.encode(jnp.ones(BLOCK)).codes.dtype
  codes = np.resize(np.arange(len(table)), 256) + jnp.iinfo(dtype).min
  blocks = 256 // format.block_size
  stored = formats.Block(jnp.asarray(codes).astype(dtype), jnp.ones(blocks))
  got = format.decode(stored, jnp.zeros(256))[: len(table)]
  np.testing.assert_allclose(got, table, rtol=1e-6, atol=0)


@over_tables
@pytest.mark.parametrize('spaced', ['linear', 'log'])
def test_codes_are_the_nearest(format, table, spaced):
  """Exact, but for ties: derived, where a middle is within 8 roundings."""
  x = np.linspace(0, 1, 200_001)
  if spaced == 'log':
    x = np.geomspace(1e-9, 1, 200_001)
  if table[0] < 0:
    x = np.concatenate([x, -x])
  x = with_unit_scale(x)
  codes = jax.jit(format.encode)(x).codes
  codes = np.asarray(codes.astype(jnp.int32)) - jnp.iinfo(codes.dtype).min
  middles = (table[1:] + table[:-1]) / 2
  nearest = np.searchsorted(middles, x)
  away = np.abs(x[:, None] - middles).min(1)
  tie = away <= 8 * 2.0**-24 * np.abs(x)
  assert tie.mean() < 1e-3
  np.testing.assert_array_equal(codes[~tie], nearest[~tie])
  assert np.abs(codes - nearest).max() <= 1


@pytest.mark.parametrize('name', ['dynamic', 'sqrt', 'log', 'softsign'])
@pytest.mark.parametrize('rounding', ['nearest', 'stochastic'])
def test_second_moments_never_become_zero(name, rounding):
  """Exact; and it is `keep_nonzero` that keeps them."""
  x = with_unit_scale(np.geomspace(1e-30, 1, 10_000))
  key = jax.random.key(0)
  kept = formats.BlockInt(8, False, name, rounding=rounding)
  assert jnp.all(kept.decode(kept.encode(x, key), x) > 0)
  if name != 'log':
    lost = formats.BlockInt(
      8, False, name, rounding=rounding, keep_nonzero=False
    )
    assert jnp.any(lost.decode(lost.encode(x, key), x) == 0)


@pytest.mark.parametrize('dtype', ['e4m3', 'e5m2'])
def test_fp8_codes_are_those_of_a_cast(dtype):
  """Exact: ties go to either side, which no value here is."""
  kind = {'e4m3': ml_dtypes.float8_e4m3fn, 'e5m2': ml_dtypes.float8_e5m2}[dtype]
  largest = float(ml_dtypes.finfo(kind).max)
  x = np.random.default_rng(0).standard_normal(64 * BLOCK).astype(np.float32)
  x = x.reshape(-1, BLOCK)
  x[:, 0] = 8.0  # a power of two, by which dividing is exact
  format = formats.Float8(dtype, expand=False)
  stored = jax.jit(format.encode)(x.ravel())
  want = (x / 8.0 * largest).astype(kind).ravel()
  got = np.asarray(stored.codes)
  same = got.view(np.uint8) == want.view(np.uint8)
  # x / scale * largest and x / (scale / largest) round differently.
  assert same.mean() > 0.999
  np.testing.assert_array_equal(stored.scales, np.full(64, 8.0))


def test_expansion_is_not_collapsed_by_one_small_value():
  """Claim: the others keep half of their precision or better."""
  rng = np.random.default_rng(0)
  x = np.exp(rng.uniform(-1, 1, (8, BLOCK))).astype(np.float32)
  format = formats.Float8()
  clean = np.abs(format.decode(format.encode(x), x) - x).mean()
  for small in (0.0, 1e-30):
    worse = x.copy()
    worse[:, 3] = small
    seen = np.asarray(format.decode(format.encode(worse), worse))
    others = np.arange(BLOCK) != 3
    error = np.abs(seen - worse)[:, others].mean()
    plain = formats.Float8(expand=False)
    without = np.asarray(plain.decode(plain.encode(worse), worse))
    limit = np.abs(without - worse)[:, others].mean()
    # A zero changes nothing; else it is bounded by what no expansion loses,
    # twice as k is at least 1/2.
    assert error <= (clean * 1.01 if small == 0 else 2.2 * limit)


def test_a_bad_value_is_seen_and_leaves_its_block_alone():
  """Exact for itself and for other blocks, whatever the sign of the NaN.

  Also where XLA's maximum drops it. Derived for its block: half a step of the
  coarsest of these grids, which has six an octave.
  """
  x = np.ones((8, 256), np.float32)
  cases = {
    formats.BlockInt(8): (np.nan, -np.nan, np.inf, -np.inf),
    formats.BlockInt(4, map='softsign'): (np.nan, np.inf),
    formats.BlockInt(8, False): (np.nan, -np.nan, np.inf, -1.0),
    formats.BlockInt(4, False): (np.nan, -np.nan, np.inf, -1.0),
    formats.BlockInt(8, False, 'sqrt'): (np.nan, np.inf, -1.0),
    formats.Float8(): (np.nan, -np.nan, np.inf),
  }
  for format, values in cases.items():
    for value in values:
      bad = x.copy()
      bad[5, 200] = value
      seen = jax.jit(lambda x, f=format: f.decode(f.encode(x), x))(bad)
      unsigned = not format.signed and value < 0
      assert_bad_value(np.array(seen), np.nan if unsigned else value)


def assert_bad_value(seen, value):
  np.testing.assert_array_equal(seen[5, 200], np.float32(value))
  seen[5, 200] = 1
  np.testing.assert_allclose(seen[5, 128:], 1, rtol=2 ** (1 / 12) - 1)
  seen[5, 128:] = 1
  np.testing.assert_array_equal(seen, 1)


def test_blocks_and_rows():
  """What `memory.plan` calls one scale a row."""
  cases = {
    (16, 256): ((16, 2), False),
    (3, 8, 128): ((3, 8, 1), False),
    (256,): ((2,), False),
    (15, 256): ((15,), True),
    (16, 200): ((16,), True),
    (5, 200): ((5,), True),
    (200,): ((), True),
    (4096, 3): ((), True),
    (7, 64, 4): ((7,), True),
    (): ((), False),
  }
  format = formats.BlockInt(8)
  for shape, (scales, rows) in cases.items():
    stored = jax.eval_shape(format.encode, jax.ShapeDtypeStruct(shape, 'f4'))
    assert stored.codes.shape == shape
    assert stored.scales.shape == scales, shape
    assert bool(format.note(shape)) == rows, shape


def test_factors_keep_sums_and_what_has_rank_one():
  """Derived: a few roundings of float32 for each of the sums."""
  rng = np.random.default_rng(0)
  format = formats.Factored()
  x = np.outer(rng.random(16), rng.random(32)).astype(np.float32)
  np.testing.assert_allclose(
    format.decode(format.encode(x), x), x, rtol=32 * 2.0**-23
  )
  x = rng.random((2, 16, 32)).astype(np.float32)
  seen = np.asarray(format.decode(format.encode(x), x))
  for axis in (-1, -2):
    np.testing.assert_allclose(seen.sum(axis), x.sum(axis), rtol=64 * 2.0**-23)
  with pytest.raises(ValueError, match='`x` must have two axes or more'):
    format.encode(jnp.ones(8))


def test_a_zero_row_beside_large_ones_is_no_nan():
  x = np.ones((4, 128), np.float32) * 1e8
  x[1] = 0
  format = formats.Factored()
  seen = np.asarray(format.decode(format.encode(x), x))
  assert np.isfinite(seen).all() and (seen[1] == 0).all()
  assert (seen[0] > 0).all()


@pytest.mark.parametrize('signed', [True, False])
def test_feedback_beats_either_format(signed):
  """Claim: eight bits and four lose less than a quarter of what eight do."""
  rng = np.random.default_rng(0)
  x = (rng.standard_normal((16, 256)) ** (1 if signed else 2)).astype('f4')
  value = formats.BlockInt(8, signed)
  both = formats.ErrorFeedback(value, formats.BlockInt(4))
  alone, fed = (np.asarray(f.decode(f.encode(x), x)) - x for f in (value, both))
  assert np.abs(fed).mean() < 0.25 * np.abs(alone).mean()
  if not signed:
    assert ((fed + x > 0) == (x > 0)).all()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'bits': 3}, '`bits` must be one of'),
    ({'map': 'cubic'}, '`map` must be one of'),
    ({'map': 'log'}, "`map='log'` is for unsigned values"),
    ({'signed': False, 'scale': 'rank1'}, "`map='log'` is for unsigned"),
    ({'scale': 'row'}, '`scale` must be one of'),
    ({'block_size': 1}, '`block_size` must be an integer, 2 or more; got 1'),
    ({'rounding': 'up'}, '`rounding` must be one of'),
  ],
)
def test_settings_that_do_not_go_together(arguments, message):
  with pytest.raises(ValueError, match=message):
    formats.BlockInt(**arguments)


def test_stochastic_rounding_needs_a_key():
  with pytest.raises(ValueError, match='`key` is None, but BlockInt'):
    formats.BlockInt(8, rounding='stochastic').encode(jnp.ones(4))
