# SPDX-License-Identifier: Apache-2.0
"""Laws that every format keeps: laws x ``tables.FORMATS`` x awkward arrays.

Tolerances are exact (words are compared), derived (from the row's bound and
from what float32 can hold) or statistical (5 sigma, fixed keys).
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


SHAPE = (33, 17)
ARRAYS = {
  'normal': _normal(*SHAPE),
  'zeros': np.zeros(SHAPE, np.float32),
  'negative-zeros': np.full(SHAPE, -0.0, np.float32),
  'subnormals': _signed(np.full(SHAPE, 1e-40)),
  'huge': _signed(np.full(SHAPE, 1e38)),
  'wide': _signed(np.exp(np.linspace(-60, 60, 561)).reshape(SHAPE)),
  'scalar': _normal(),
  'one': _normal(1),
  'empty': _normal(0, 4),
  '127': _normal(127),
  '128': _normal(128),
  '2x129': _normal(2, 129),
}
SHAPES = sorted({x.shape for x in ARRAYS.values()})


def _in_range(row, x):
  return np.abs(x) <= np.float32(row.high)


# A case is left out where no value of the array is in the range of the format.
CASES = [
  pytest.param(row, x, id=f'{name}-{array}')
  for name, row in tables.FORMATS.items()
  for array, x in ARRAYS.items()
  if x.size == 0 or _in_range(row, x).any()
]
ROWS = [pytest.param(row, id=name) for name, row in tables.FORMATS.items()]


def _is_stochastic(row):
  return "'stochastic'" in repr(row.format)


STOCHASTIC = [
  pytest.param(row, id=name)
  for name, row in tables.FORMATS.items()
  if _is_stochastic(row)
]

over_cases = pytest.mark.parametrize(('row', 'x'), CASES)
over_shapes = pytest.mark.parametrize('shape', SHAPES, ids=str)
over_rows = pytest.mark.parametrize('row', ROWS)
over_stochastic = pytest.mark.parametrize('row', STOCHASTIC)


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


def bound(row, x):
  """Derived: what one store may change, from the row of the table."""
  x = np.abs(np.asarray(x, np.float64))
  below = row.absolute + row.rel * x + FLUSHED
  return np.where(x >= row.low, row.rel * x, below)


@over_rows
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
  inside = _in_range(row, x)
  error = np.abs(np.asarray(seen, np.float64) - x)
  assert np.all(error[inside] <= bound(row, x)[inside])


@over_cases
def test_finite_stays_finite(row, x):
  chex.assert_tree_all_finite(
    jnp.where(_in_range(row, x), round_trip(row.format, x), 0)
  )


@over_rows
@pytest.mark.parametrize('array', ['zeros', 'negative-zeros'])
def test_zero_is_exact(row, array):
  """Exact: no scale, no noise, no residual makes something of nothing."""
  x = ARRAYS[array]
  chex.assert_trees_all_equal(round_trip(row.format, x), x)
  chex.assert_trees_all_equal(visible(encode(row.format, x)) == 0, x == 0)


@over_cases
def test_a_second_store_changes_nothing(row, x):
  """Exact, with another key as well, but for one format.

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
  else:
    chex.assert_trees_all_equal(words(once), words(twice))


@over_cases
def test_sign_symmetry(row, x):
  """Exact: the same key rounds -x to minus what it rounds x to."""
  chex.assert_trees_all_equal(
    round_trip(row.format, -x), -round_trip(row.format, x)
  )


@over_rows
@settings(max_examples=8, deadline=None, database=None)
@given(
  shape=st.lists(st.integers(0, 130), max_size=3).map(tuple),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)
def test_any_shape_and_dtype(row, shape, dtype):
  """Shapes only: nothing is computed."""
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
@pytest.mark.parametrize('array', ['normal', 'wide', 'subnormals'])
def test_jit_gives_the_same_words(row, array):
  x = jnp.asarray(ARRAYS[array])
  stored = row.format.encode(x, KEY)
  chex.assert_trees_all_equal(words(stored), words(encode(row.format, x)))
  seen = row.format.decode(stored, like(x))
  chex.assert_trees_all_equal(words(seen), words(round_trip(row.format, x)))


@over_rows
def test_vmap_is_a_loop(row):
  x = _normal(5, 128)
  keys = jax.random.split(KEY, len(x))
  batched = jax.vmap(functools.partial(store, row.format))(x, keys)
  one_by_one = [store(row.format, *each) for each in zip(x, keys, strict=True)]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *one_by_one)
  chex.assert_trees_all_equal(words(batched), words(stacked))


@over_rows
def test_a_narrow_array_is_stored_as_its_float32(row):
  x = jnp.asarray(ARRAYS['128'])
  narrow = x.astype(jnp.bfloat16), x.astype(jnp.float16)
  seen = jax.jit(lambda xs: [row.format.encode(x, KEY) for x in xs])(narrow)
  wide = [encode(row.format, x.astype(jnp.float32)) for x in narrow]
  chex.assert_trees_all_equal(words(seen), words(wide))


@over_rows
@pytest.mark.parametrize('array', ['normal', 'scalar', 'empty'])
def test_flax_serialises_it(row, array):
  stored = encode(row.format, ARRAYS[array])
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
  x = np.full(128, word, np.uint32).view(np.float32)
  for key in jax.random.split(KEY, 4):
    stored, seen = store(row.format, x, key)
    assert np.all(np.isnan(seen))
    assert np.all(np.isnan(np.asarray(visible(stored), np.float32)))


@over_rows
def test_nan_beside_numbers_changes_nothing(row):
  x = np.array(ARRAYS['normal'])
  alone = round_trip(row.format, x)
  x[3, 5], x[7, 2] = np.nan, np.inf
  beside = np.array(round_trip(row.format, x))
  beside[3, 5], beside[7, 2] = alone[3, 5], alone[7, 2]
  chex.assert_trees_all_equal(words(beside), words(alone))


@over_rows
def test_infinities_stay_with_their_sign(row):
  """Exact."""
  x = np.tile(np.array([np.inf, -np.inf], np.float32), 64)
  for key in jax.random.split(KEY, 4):
    stored, seen = store(row.format, x, key)
    chex.assert_trees_all_equal(seen, x)
    chex.assert_trees_all_equal(np.asarray(visible(stored), np.float32), x)


@over_rows
def test_bits_per_value(row):
  """Exact, and counted once more from the bytes of what is stored."""
  shape = (256, 1024)
  assert formats.bits_per_value(row.format, shape) == row.bits
  stored = encode(row.format, np.zeros(shape, np.float32))
  size = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(stored))
  assert size == row.bits * np.prod(shape)
  assert formats.bits_per_value(row.format, (0, 4)) == 0


@over_rows
def test_stored_is_one_leaf(row):
  stored = encode(row.format, ARRAYS['one'])
  assert formats.is_stored(stored) == (not isinstance(stored, jax.Array))
  leaves = jax.tree.leaves({'a': stored}, is_leaf=formats.is_stored)
  assert len(leaves) == 1


@over_rows
def test_formats_are_frozen_values(row):
  field = dataclasses.fields(row.format)[0].name
  with pytest.raises(dataclasses.FrozenInstanceError):
    setattr(row.format, field, None)
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
  x = jnp.asarray(ARRAYS['normal'])
  if _is_stochastic(row):
    with pytest.raises(ValueError, match='`key` is None') as caught:
      row.format.encode(x)
    assert 'jax.random.key' in str(caught.value)
    with pytest.raises(ValueError, match='`key` is None'):
      jax.eval_shape(row.format.encode, x)
  else:
    chex.assert_trees_all_equal(
      words(row.format.encode(x)), words(encode(row.format, x))
    )


@over_stochastic
def test_keys_decide_the_draw(row):
  x = ARRAYS['normal']
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


@over_stochastic
@pytest.mark.parametrize('array', ['normal', 'wide'])
def test_mean_is_exact(row, array):
  """Statistical: an outcome is one of two neighbours, one step apart.

  The step is at most the row's bound, so sigma is at most half of that. The
  mean of all errors, in units of the bound, is held to the same rule.
  """
  x = ARRAYS[array]
  keys = jax.random.split(jax.random.key(3), 2048)
  inside = (np.abs(x) >= row.low) & _in_range(row, x)
  drawn = np.asarray(draws(row.format, x, keys))[:, inside]
  x = x[inside]
  # The difference of two float32s this near each other is exact.
  error = np.mean(drawn - x, axis=0, dtype=np.float64) / bound(row, x)
  assert np.all(np.abs(error) <= 5 * 0.5 / np.sqrt(len(keys)))
  assert np.abs(error.mean()) <= 5 * 0.5 / np.sqrt(len(keys) * x.size)


@over_rows
def test_the_same_on_eight_devices(row):
  """Exact: noise looks at global positions."""
  x = ARRAYS['128']
  mesh = jax.make_mesh(
    (4, 2), ('a', 'b'), axis_types=(AxisType.Auto, AxisType.Auto)
  )
  sharding = NamedSharding(mesh, PartitionSpec(('a', 'b')))
  cut = encode(row.format, jax.device_put(x, sharding))
  for leaf in jax.tree.leaves(cut):
    assert leaf.sharding.is_equivalent_to(sharding, 1)
  chex.assert_trees_all_equal(words(cut), words(encode(row.format, x)))
