# SPDX-License-Identifier: Apache-2.0
"""Laws that every format keeps: laws x ``tables.FORMATS`` x awkward arrays.

Tolerances are exact (words are compared), derived (from the row's bound and
from what float32 can hold) or statistical (5 sigma, fixed keys).

Where values share a scale, errors are measured in the bins of the block. No law
but one of its own speaks of a value that is no number, or is above 2^48 beside
smaller ones.
"""

import dataclasses
import functools

import chex
import flax.serialization
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from optax_mp import formats
import tables

KEY = jax.random.key(17)
NANS = np.array([0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF], np.uint32)
# XLA flushes subnormals: what lies below the smallest normal may become 0.
FLUSHED = 2.0**-126


def _normal(*shape):
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _signed(x):
  return np.where(np.indices(x.shape).sum(0) % 2, -x, x).astype(np.float32)


def _one_hot(rows, columns):
  x = np.zeros((rows, columns), np.float32)
  x[np.arange(rows), np.arange(rows) % columns] = 0.3
  return _signed(x)


def _outliers(rows, columns):
  """In each row one value that is a million times larger."""
  return _normal(rows, columns) * np.where(_one_hot(rows, columns), 1e6, 1)


SHAPE = (33, 17)  # a scale a row
BLOCKS = (16, 256)  # two blocks a row
ARRAYS = {
  'normal': _normal(*SHAPE),
  'zeros': np.zeros(SHAPE, np.float32),
  'negative-zeros': np.full(SHAPE, -0.0, np.float32),
  'subnormals': _signed(np.full(SHAPE, 1e-40)),
  'huge': _signed(np.full(SHAPE, 1e38)),
  'large': _signed(np.full(SHAPE, 8e37)),
  'wide': _signed(np.exp(np.linspace(-60, 60, 561)).reshape(SHAPE)),
  'wide-rows': _signed(np.geomspace(2.0**-100, 1, 561).reshape(17, 33).T),
  'one-hot': _one_hot(*SHAPE),
  'equal': _signed(np.full(SHAPE, 0.3)),
  'outliers': _outliers(*SHAPE).astype(np.float32),
  'half-zeros': np.where(_normal(*SHAPE) > 0, np.float32(1e-8), 0),
  'blocks': _normal(*BLOCKS) * np.repeat(np.array([1, 1e-3], 'f4'), 128),
  'scalar': _normal(),
  'one': _normal(1),
  'empty': _normal(0, 4),
  '127': _normal(127),
  '128': _normal(128),
  '2x129': _normal(2, 129),
}
SHAPES = sorted({x.shape for x in ARRAYS.values()})
FEW = [BLOCKS, (0, 4)]  # for rows of the table that another is much like


def _in_range(row, x):
  return np.abs(x) <= np.float32(row.high)


def _usual(row, x):
  """In range, and not so large that only an overflow can have made it."""
  return _in_range(row, x) & ~tables.outliers(row, x)


def _of_row(row, x):
  """The array, or its magnitudes: a -0 stays one."""
  return x if row.signed else np.where(x < 0, -x, x)


def _takes(row, shape):
  return len(shape) >= row.axes and (row.odd or shape in FEW)


def _fits(row, x):
  return _takes(row, x.shape) and (x.size == 0 or _in_range(row, x).any())


def _param(name, *values, id=None):
  return pytest.param(tables.FORMATS[name], *values, id=id or name)


# A case is left out where no value of the array is in the range of the format.
CASES = [
  _param(name, _of_row(row, x), id=f'{name}-{array}')
  for name, row in tables.FORMATS.items()
  for array, x in ARRAYS.items()
  if _fits(row, x)
]
SHAPE_CASES = [
  _param(name, shape, id=f'{name}-{shape}')
  for name, row in tables.FORMATS.items()
  for shape in SHAPES
  if _takes(row, shape)
]


def _rows(condition=lambda row: True):
  rows = tables.FORMATS.items()
  return [_param(name) for name, row in rows if condition(row)]


def _is_stochastic(row):
  return "'stochastic'" in repr(row.format)


over_cases = pytest.mark.parametrize(('row', 'x'), CASES)
over_shapes = pytest.mark.parametrize(('row', 'shape'), SHAPE_CASES)
over_rows = pytest.mark.parametrize('row', _rows())
over_stochastic = pytest.mark.parametrize('row', _rows(_is_stochastic))
over_fitted = pytest.mark.parametrize(
  'row', _rows(lambda row: hasattr(row.format, 'fit'))
)


pytestmark = pytest.mark.usefixtures('strict')


@functools.partial(jax.jit, static_argnums=0)
def store(format, x, key=KEY):
  """What is stored, and what comes back: one compilation for most laws."""
  stored = format.encode(x, key)
  return stored, format.decode(stored, like(x))


def like(x, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(np.shape(x), dtype)


def encode(format, x, key=KEY):
  return store(format, x, key)[0]


def round_trip(format, x, key=KEY):
  return store(format, x, key)[1]


def words(tree):
  """The words of all arrays of a tree: -0 is not 0, a NaN equals itself."""
  unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}
  return jax.tree.map(
    lambda x: np.asarray(x).view(unsigned[np.asarray(x).itemsize]), tree
  )


def visible(stored):
  """The part of a stored array that a model would use as it is."""
  for field in ('high', 'value'):
    stored = getattr(stored, field, stored)
  return stored


def array(row, name):
  return jnp.asarray(_of_row(row, ARRAYS[name]))


def bound(row, x, bad=None):
  """Derived: what one store may change, from the row of the table.

  Args:
    row: of the table.
    x: the values.
    bad: which of them are no numbers; the others have fewer codes.
  """
  bad = np.zeros(x.shape, bool) if bad is None else bad
  x = np.where(tables.outliers(row, x) | bad, np.float32(0), x)
  if row.bound is not None:
    move, x = row.bound(x, bad), np.abs(np.asarray(x, np.float64))
    return move + row.slop * (x + move) + FLUSHED
  x = np.abs(np.asarray(x, np.float64))
  below = row.absolute + row.rel * x + FLUSHED
  return np.where(x >= row.low, row.rel * x, below)


def assert_same(ulps, *decoded):
  """Exact, but where a row says that compilers may round otherwise."""
  if ulps:
    chex.assert_trees_all_close_ulp(*decoded, maxulp=ulps)
  else:
    chex.assert_trees_all_equal(*map(words, decoded))


def assert_same_stored(row, *stored):
  """Exact; derived for sums, in any order, and for what is left of values."""
  if row.shares == 'matrix':
    rtol = 1024 * 2.0**-24  # the longest sum
    chex.assert_trees_all_close(*stored, rtol=rtol)
  elif isinstance(stored[0], formats.Feedback) and row.ulps:
    chex.assert_trees_all_equal(*(words(x.value) for x in stored))
    codes, scales = zip(*(x.residual for x in stored), strict=True)
    # Relative to the value, and so are the ulps by which it may differ.
    chex.assert_trees_all_close(*scales, rtol=0, atol=row.ulps * 2.0**-23)
    chex.assert_trees_all_close(*map(np.int32, codes), rtol=0, atol=1)
  else:
    chex.assert_trees_all_equal(*map(words, stored))


@over_shapes
def test_shape_and_dtype_come_back(row, shape):
  """Those of `like`, and `encode` stores what `eval_shape` foretells."""
  x = np.ones(shape, np.float32)
  stored = jax.eval_shape(row.format.encode, x, KEY)
  chex.assert_trees_all_equal_shapes_and_dtypes(stored, encode(row.format, x))
  for dtype in (jnp.float32, jnp.bfloat16):
    wanted = like(x, dtype)
    seen = jax.eval_shape(
      functools.partial(row.format.decode, like=wanted), stored
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(seen, wanted)


@over_cases
def test_error_is_within_the_bound(row, x):
  """Derived, or exact where the row says so."""
  seen = round_trip(row.format, x)
  if row.exact:
    chex.assert_trees_all_equal(words(seen), words(x))
  inside = _usual(row, x)
  error = np.abs(np.asarray(seen, np.float64) - x)
  assert np.all(error[inside] <= bound(row, x)[inside])


@over_cases
def test_finite_stays_finite(row, x):
  chex.assert_tree_all_finite(
    jnp.where(_in_range(row, x), round_trip(row.format, x), 0)
  )


@over_rows
@pytest.mark.parametrize('name', ['zeros', 'negative-zeros'])
def test_zero_is_exact(row, name):
  """Exact: no scale, no noise, no residual makes something of nothing."""
  x = ARRAYS[name]
  chex.assert_trees_all_equal(round_trip(row.format, x), x)
  if not row.shares:
    chex.assert_trees_all_equal(visible(encode(row.format, x)) == 0, x == 0)


@over_cases
def test_zeros_and_others_stay_apart(row, x):
  """Exact: a second moment that becomes zero is a division by nothing."""
  seen = np.asarray(round_trip(row.format, x))
  if row.zero:
    assert not np.any(seen[x == 0])
  low = FLUSHED if row.shares else max(row.low, FLUSHED)
  others = _in_range(row, x) & (np.abs(x) >= low)
  if row.nonzero:
    assert np.all(seen[others])
  if not row.signed:
    assert np.all(seen >= 0)


@over_cases
def test_a_second_store_changes_nothing(row, x):
  """Exact, with another key as well, but for the formats of two kinds.

  A second store of a format whose grid depends on more than the largest value
  of a block may have another grid: derived, it is one store more.

  The grid of SplitFloat16(8), x' + k h / 127, is no float32 grid. A decoded
  value is off it by a rounding, a thirtieth of its step or less: that cannot
  move a nearest rounding, but a stochastic one moves as often as that, by one
  step, and is unbiased still. Derived: a step is within the row's bound.
  """
  once = round_trip(row.format, x)
  twice = round_trip(row.format, once, jax.random.key(1))
  if row.format == formats.SplitFloat16(8, 'stochastic'):
    inside = _in_range(row, x)
    once, twice = (np.asarray(y, np.float64)[inside] for y in (once, twice))
    moved = np.abs(once - twice)
    assert np.all(moved <= bound(row, once))
    # A deviation of n Bernoulli draws, each with a probability of 1/30.
    often = x.size / 30 + 5 * np.sqrt(x.size / 30)
    assert np.count_nonzero(moved) <= often
  elif row.fixed is not None:
    assert_same(row.fixed, once, twice)
  else:
    once, twice = (np.asarray(y, np.float64) for y in (once, twice))
    assert np.all((np.abs(once - twice) <= bound(row, once))[_usual(row, x)])


@over_cases
def test_sign_symmetry(row, x):
  """Exact: the same key rounds -x to minus what it rounds x to.

  A row may have a code for the largest of a block, but not for minus that.
  """
  if not (row.signed and row.mirror):
    pytest.skip('has no signs, or looks at both ends of a block')
  there, back = round_trip(row.format, x), -round_trip(row.format, -x)
  usual = np.where(_usual(row, x), np.abs(x), 0)
  ends = 0 if row.symmetric else tables.largest(usual)
  is_end = np.maximum(np.abs(there), np.abs(back)) == ends
  chex.assert_trees_all_equal(
    np.where(is_end, 0, there), np.where(is_end, 0, back)
  )


@over_rows
@pytest.mark.parametrize('name', ['normal', 'blocks'])
@pytest.mark.parametrize('exponent', [-60, -7, 3, 40, 60])
def test_a_power_of_two_changes_nothing(row, name, exponent):
  """Exact: gradients have no natural size, so there is no floor or ceiling.

  But for what only an overflow makes beside smaller values, above 2^48.
  """
  x = array(row, name)
  if row.high < 1e30:
    pytest.skip('has the range of float16')
  if tables.outliers(row, np.asarray(x) * 2.0**exponent).any():
    pytest.skip('values above 2^48 beside smaller ones')
  stored, seen = store(row.format, x)
  other, scaled = store(row.format, x * 2.0**exponent)
  chex.assert_trees_all_equal(words(scaled), words(seen * 2.0**exponent))
  if isinstance(stored, formats.Block):
    chex.assert_trees_all_equal(words(stored.codes), words(other.codes))


@over_rows
@settings(max_examples=6, deadline=None, database=None)
@given(
  shape=st.lists(st.integers(0, 130), max_size=3).map(tuple),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)
def test_any_shape_and_dtype(row, shape, dtype):
  """Shapes only: nothing is computed."""
  shape = (2,) * (row.axes - len(shape)) + shape
  x = jax.ShapeDtypeStruct(shape, dtype)

  def there_and_back(x):
    stored = row.format.encode(x, KEY)
    wide = row.format.encode(x.astype(jnp.float32), KEY)
    chex.assert_trees_all_equal_shapes_and_dtypes(stored, wide)
    return row.format.decode(stored, x)

  chex.assert_trees_all_equal_shapes_and_dtypes(
    jax.eval_shape(there_and_back, x), x
  )


@over_rows
@pytest.mark.parametrize('name', ['normal', 'wide', 'subnormals'])
def test_jit_gives_the_same_words(row, name):
  x = array(row, name)
  stored = row.format.encode(x, KEY)
  compiled, wanted = store(row.format, x)
  assert_same_stored(row, stored, compiled)
  assert_same(row.ulps, row.format.decode(compiled, like(x)), wanted)


@over_rows
def test_vmap_is_a_loop(row):
  x = _of_row(row, _normal(3, *BLOCKS))
  keys = jax.random.split(KEY, len(x))
  batched = jax.vmap(functools.partial(store, row.format))(x, keys)
  one_by_one = [store(row.format, *each) for each in zip(x, keys, strict=True)]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *one_by_one)
  assert_same_stored(row, batched[0], stacked[0])
  assert_same(row.ulps, batched[1], stacked[1])


@over_fitted
@pytest.mark.parametrize('name', ['normal', 'wide', 'outliers', 'half-zeros'])
def test_scales_may_be_fitted_first(row, name):
  """Exact: an optimizer computes its values twice, for scales and for codes."""
  x = array(row, name)
  scales = row.format.fit(x)
  stored = row.format.encode(x, KEY, scales=scales)
  chex.assert_trees_all_equal(words(stored), words(row.format.encode(x, KEY)))


@over_rows
def test_a_narrow_array_is_stored_as_its_float32(row):
  x = array(row, 'normal')
  narrow = x.astype(jnp.bfloat16), x.astype(jnp.float16)
  seen = jax.jit(lambda xs: [row.format.encode(x, KEY) for x in xs])(narrow)
  wide = [encode(row.format, x.astype(jnp.float32)) for x in narrow]
  chex.assert_trees_all_equal(words(seen), words(wide))


@over_rows
@pytest.mark.parametrize('name', ['normal', 'scalar', 'empty'])
def test_flax_serialises_it(row, name):
  if ARRAYS[name].ndim < row.axes:
    pytest.skip('has too few axes')
  stored = encode(row.format, array(row, name))
  saved = flax.serialization.to_bytes(stored)
  blank = jax.tree.map(jnp.zeros_like, stored)
  loaded = flax.serialization.from_bytes(blank, saved)
  chex.assert_trees_all_equal_structs(loaded, stored)
  chex.assert_trees_all_equal_shapes_and_dtypes(loaded, stored)
  chex.assert_trees_all_equal(words(loaded), words(stored))


@over_rows
@pytest.mark.parametrize('word', NANS, ids=hex)
def test_nan_is_kept(row, word):
  """Carried like a number, 0x7FFFFFFF is -0 and 0x7F800001 infinite."""
  x = np.full(SHAPE, word, np.uint32).view(np.float32)
  for key in jax.random.split(KEY, 4):
    stored, seen = store(row.format, x, key)
    assert np.all(np.isnan(seen))
    if not row.shares:
      assert np.all(np.isnan(np.asarray(visible(stored), np.float32)))


def assert_comes_back(row, seen, x, bad, value):
  """What a value is stored as that no block is made for.

  Exact, but for a finite one where there are signs: derived, it is about the
  largest of the others, in its own direction.
  """
  if not row.signed or not np.isfinite(value):
    kept = np.float32(2.0**120 if np.isfinite(value) else value)
    kept = kept if row.signed or value > 0 else np.float32(np.nan)
    chex.assert_trees_all_equal(seen[bad], np.full(seen[bad].shape, kept))
    return
  toward = np.sign(value) * np.where(bad, 0, x)
  end = tables.largest(np.abs(toward) if row.mirror else toward)[bad]
  assert np.all(np.sign(value) * seen[bad] <= end * (1 + 2**-6))
  assert np.all(np.sign(value) * seen[bad] >= end * 0.5)


@over_rows
@pytest.mark.parametrize('name', ['normal', 'blocks'])
@pytest.mark.parametrize(
  'value', [np.nan, np.inf, -np.inf, 3e38, -1e30], ids=str
)
def test_one_value_leaves_the_others_alone(row, name, value):
  """An overflow costs a format the one value.

  Exact for what does not share a scale with it; derived for the others, whose
  codes are fewer. Of factors, two such values make four.
  """
  x = np.array(array(row, name))
  bad = np.zeros(x.shape, bool)
  bad[3, 5] = bad[7, 2] = True
  beside = np.where(bad, np.float32(value), x)
  seen, alone = (np.asarray(round_trip(row.format, y)) for y in (beside, x))
  if row.shares:
    assert_comes_back(row, seen, x, bad, value)
    marks = bad & (not row.signed or not np.isfinite(value))
    error = np.abs(np.asarray(seen, np.float64) - x)
    inside = ~tables.lost(row, bad)
    limit = bound(row, np.where(bad, np.float32(0), x), marks)
    assert np.all(error[inside] <= limit[inside])
  others = ~tables.sharing(row, bad)
  chex.assert_trees_all_equal(words(seen[others]), words(alone[others]))


@pytest.mark.parametrize('row', _rows(lambda row: row.shares))
@pytest.mark.parametrize('name', ['normal', 'blocks'])
def test_a_marked_block_does_not_drift(row, name):
  """Derived: stored again and again, the others stay within a bin.

  An infinite second moment stays for good. Rounded to nearest, as the mean of
  stochastic rounding is right in any case.
  """
  format = row.format
  if _is_stochastic(row):
    if hasattr(format, 'stochastic_below'):
      format = dataclasses.replace(format, stochastic_below=None)
    format = dataclasses.replace(format, rounding='nearest')
  x = np.array(array(row, name))
  bad = np.zeros(x.shape, bool)
  bad[3, 5] = True
  x = np.where(bad, np.float32(0), x)
  once = again = round_trip(format, np.where(bad, np.float32(np.inf), x))
  for _ in range(20):
    again = round_trip(format, again)
  moved = np.abs(np.asarray(again, np.float64) - once)
  beside = tables.sharing(row, bad) & ~bad
  if row.shares == 'matrix':  # its own first store is of no rank 1
    assert np.all(moved[beside] <= 2**-12 * np.asarray(once)[beside])
  else:
    assert np.all((moved <= 1.5 * bound(row, x, bad))[beside])
  assert np.all(np.asarray(again)[bad] == np.inf)


@pytest.mark.parametrize('row', _rows(lambda row: row.shares))
@pytest.mark.parametrize('huge', [1e30, 2e38])
def test_an_infinity_beside_huge_values(row, huge):
  """Exact for itself; nothing else becomes zero, small or no number."""
  if huge > row.high:
    pytest.skip('beyond the range of the format')
  x = np.full(BLOCKS, huge, np.float32)
  x[3, 5], x[9, 200] = np.inf, -0.0
  seen = np.asarray(round_trip(row.format, x))
  assert np.isinf(seen[3, 5])
  usual = np.isfinite(x) & (x != 0) & ~tables.lost(row, x == 0)
  assert np.all(np.isfinite(seen[usual]) & (seen[usual] > huge / 32))


def test_a_row_of_huge_values_is_its_own():
  """Exact. Along columns they share scales with small values."""
  x = np.full(BLOCKS, 1e-6, np.float32)
  x[3] = 1e30
  for row in (tables.FORMATS['linear-4-rank1'], tables.FORMATS['factored']):
    seen = np.asarray(round_trip(row.format, x))
    assert np.all(seen[3] >= np.float32(1e30))
    assert np.all(np.delete(seen, 3, 0) < 1e-5)


@over_rows
def test_infinities_stay_with_their_sign(row):
  """Exact, for a group of nothing else as well."""
  x = _of_row(row, _signed(np.full(SHAPE, np.inf)))
  for key in jax.random.split(KEY, 4):
    stored, seen = store(row.format, x, key)
    chex.assert_trees_all_equal(seen, x)
    if not row.shares:
      chex.assert_trees_all_equal(np.asarray(visible(stored), np.float32), x)


def width(dtype):
  """Bits; a byte that JAX says a 4-bit integer takes is packed on devices."""
  return 4 if dtype.name in ('int4', 'uint4') else 8 * dtype.itemsize


@over_rows
def test_bits_per_value(row):
  """Exact, and counted once more from the bytes of what is stored."""
  assert formats.bits_per_value(row.format, (256, 1024)) == row.bits
  stored = encode(row.format, array(row, 'blocks'))
  size = sum(leaf.size * width(leaf.dtype) for leaf in jax.tree.leaves(stored))
  assert size == formats.bits_per_value(row.format, BLOCKS) * np.prod(BLOCKS)
  assert formats.bits_per_value(row.format, (0, 4)) == 0


@over_rows
def test_stored_is_one_leaf(row):
  stored = encode(row.format, array(row, 'normal'))
  assert formats.is_stored(stored) == (not isinstance(stored, jax.Array))
  leaves = jax.tree.leaves({'a': stored}, is_leaf=formats.is_stored)
  assert len(leaves) == 1


@over_rows
def test_formats_are_frozen_values(row):
  with pytest.raises(dataclasses.FrozenInstanceError):
    row.format.rounding = None
  copy = dataclasses.replace(row.format)
  assert copy is not row.format
  assert copy == row.format and hash(copy) == hash(row.format)
  assert isinstance(row.format, formats.Format)


@over_rows
def test_repr_can_be_read_back(row):
  names = {name: getattr(formats, name) for name in formats.__all__}
  assert eval(repr(row.format), names) == row.format  # noqa: S307


def test_rows_differ():
  rows = [row.format for row in tables.FORMATS.values()]
  assert len(set(rows)) == len(rows)


@over_rows
def test_who_needs_a_key(row):
  x = array(row, 'normal')
  if _is_stochastic(row):
    with pytest.raises(ValueError, match='`key` is None') as caught:
      row.format.encode(x)
    assert 'jax.random.key' in str(caught.value)
    with pytest.raises(ValueError, match='`key` is None'):
      jax.eval_shape(row.format.encode, x)
  else:
    assert_same_stored(row, row.format.encode(x), encode(row.format, x))


@over_stochastic
def test_keys_decide_the_draw(row):
  x = array(row, 'normal')
  keys = jax.random.key(0), jax.random.key(1)
  first, second = (words(encode(row.format, x, key)) for key in keys)
  again = words(encode(row.format, x, jax.random.key(0)))
  chex.assert_trees_all_equal(first, again)
  with pytest.raises(AssertionError):
    chex.assert_trees_all_equal(first, second)
  raw = encode(row.format, x, jax.random.key_data(keys[0]))
  chex.assert_trees_all_equal(first, words(raw))


@functools.partial(jax.jit, static_argnums=0)
def draws(format, x, keys):
  return jax.lax.map(lambda key: store(format, x, key)[1], keys)


def log_error(row, drawn, x):
  """The mean error of a logarithm in steps, but for the steps at the ends."""
  low, high, step = tables.log_range(x, row.log_codes)
  log = tables.log_word(x)
  within = (log >= low + step) & (log <= high - step)
  return np.mean(tables.log_word(drawn) - log, axis=0) / step, within


@over_stochastic
@pytest.mark.parametrize('name', ['normal', 'wide'])
def test_mean_is_exact(row, name):
  """Statistical: an outcome is one of two neighbours, one step apart.

  The step is at most the row's bound, so sigma is at most half of that. The
  mean of all errors, in units of the bound, is held to the same rule.
  """
  x = np.asarray(array(row, name))
  keys = jax.random.split(jax.random.key(3), 2048)
  inside = (np.abs(x) >= row.low) & _in_range(row, x)
  drawn = np.asarray(draws(row.format, x, keys), np.float64)
  inside &= _usual(row, x)
  error = np.mean(drawn - x, axis=0) / bound(row, x)
  if row.log_codes:
    error, within = log_error(row, drawn, x)
    inside &= within
  if row.drawn:
    inside &= row.drawn(np.where(_usual(row, x), x, np.float32(0)))
  error = error[inside]
  assert np.all(np.abs(error) <= 5 * 0.5 / np.sqrt(len(keys)))
  assert np.abs(error.mean()) <= 5 * 0.5 / np.sqrt(len(keys) * error.size)


def on_eight(row, x, axes, spec):
  """What is stored of an array that lies on eight devices."""
  sizes = (8,) if len(axes) == 1 else (4, 2)
  if jax.device_count() < 8:
    pytest.skip('needs 8 devices')
  mesh = jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(axes))
  sharding = NamedSharding(mesh, PartitionSpec(*spec))
  stored = encode(row.format, jax.device_put(x, sharding))
  return stored, sharding


@pytest.mark.parametrize('row', _rows(lambda row: not row.shares))
def test_the_same_on_eight_devices(row):
  """Exact: noise looks at global positions."""
  x = ARRAYS['128']
  cut, sharding = on_eight(row, x, ('a', 'b'), [('a', 'b')])
  for leaf in jax.tree.leaves(cut):
    assert leaf.sharding.is_equivalent_to(sharding, 1)
  chex.assert_trees_all_equal(words(cut), words(encode(row.format, x)))


@pytest.mark.parametrize('row', _rows(lambda row: row.shares and row.odd))
@pytest.mark.parametrize('spec', [('d', None), (None, 'd')], ids=str)
def test_scales_are_the_same_on_eight_devices(row, spec):
  """Exact: scales look at whole blocks; derived for sums in another order."""
  x = _of_row(row, _normal(64, 1024))
  cut, sharding = on_eight(row, x, ('d',), spec)
  whole = encode(row.format, x)
  for leaf in jax.tree.leaves(cut):
    if leaf.ndim == x.ndim:
      assert leaf.sharding.is_equivalent_to(sharding, x.ndim)
  assert_same_stored(row, cut, whole)
