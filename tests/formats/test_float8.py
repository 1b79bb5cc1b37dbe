# SPDX-License-Identifier: Apache-2.0
"""Float8: all numbers of two dtypes, casts, and the range expansion of COAT."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from optax_mp import formats
from optax_mp.formats import _fp8
import tables

BLOCK = 128
# Eight units in the last place: a few roundings of float32.
ROUNDINGS = 2.0**-20
# Of powers, whose logarithms are float32 numbers of up to 33 octaves.
POWERS = 2.0**-16
DTYPES = {'e4m3': ml_dtypes.float8_e4m3fn, 'e5m2': ml_dtypes.float8_e5m2}
NUMBERS = {'e4m3': tables.E4M3, 'e5m2': tables.E5M2}
both_dtypes = pytest.mark.parametrize('dtype', DTYPES)


@functools.partial(jax.jit, static_argnums=0)
def store(format, x, key=None):
  stored = format.encode(x, key)
  return stored, format.decode(stored, x)


def round_trip(format, x):
  return np.asarray(store(format, x)[1], np.float64)


def exponent(dtype, low, high):
  """COAT's k, from its definition."""
  reach = np.log2(NUMBERS[dtype][-1] ** 2 / 2)
  return np.clip(np.floor(16 * reach / np.log2(high / low)), 8, 255) / 16


def block(low, high):
  """Blocks of values between two, both of them in it, and both signs."""
  x = np.exp(np.random.default_rng(0).uniform(np.log(low), np.log(high), 1024))
  x = x.reshape(8, BLOCK) * np.where(np.arange(BLOCK) % 3, 1, -1)
  x[:, 0], x[:, 1] = low, -high
  return x.astype(np.float32)


@both_dtypes
def test_all_numbers_are_those_of_the_dtype(dtype):
  """Exact, by integers, in both directions and just below each."""
  numbers, table = {'e4m3': _fp8.E4M3, 'e5m2': _fp8.E5M2}[dtype], NUMBERS[dtype]
  codes = jnp.arange(len(table), dtype=jnp.int32)
  assert numbers.top == len(table) - 1 and numbers.largest == table[-1]
  chex.assert_trees_all_equal(
    np.asarray(numbers.number(codes), np.float64), table
  )
  exact = jnp.asarray(table, jnp.float32)
  chex.assert_trees_all_equal(numbers.code(exact), codes)
  below = jnp.nextafter(exact[1:], jnp.zeros(()))
  chex.assert_trees_all_equal(numbers.code(below), codes[:-1])


def in_blocks(values, largest):
  """Blocks of 127 values, of both signs, and the largest."""
  x = np.resize(np.concatenate([values, -values]), (1032, BLOCK - 1))
  x = np.pad(x, [(0, 0), (0, 1)], constant_values=largest)
  return x.astype(np.float32)


@both_dtypes
def test_codes_are_those_of_a_cast(dtype):
  """Exact, but for values that are some roundings from the middle of two."""
  table, cast = NUMBERS[dtype], DTYPES[dtype]
  values = (
    np.linspace(0, table[-1], 2**15),
    np.geomspace(1e-8, table[-1], 2**15),
  )
  x = in_blocks(np.concatenate(values), table[-1])
  format = formats.Float8(dtype, expand=False, keep_nonzero=False)
  stored, _ = store(format, x)
  assert stored.codes.dtype == cast
  seen = np.asarray(stored.codes).astype(np.float32)
  middles, size = (table[1:] + table[:-1]) / 2, np.abs(x.astype(np.float64))
  ways = [size * (1 - ROUNDINGS), size * (1 + ROUNDINGS)]
  low, high = (np.searchsorted(middles, way) for way in ways)
  tie = low != high
  chex.assert_trees_all_equal(seen[~tie], x.astype(cast).astype('f4')[~tie])
  assert np.all((table[low] <= np.abs(seen)) & (np.abs(seen) <= table[high]))
  assert np.count_nonzero(tie) < x.size / 500


@both_dtypes
@pytest.mark.parametrize('expand', [True, False])
@pytest.mark.parametrize('low', [1e-20, 1e-30])
def test_what_is_not_zero_stays_so(dtype, expand, low):
  """Exact, with its sign; and it is `keep_nonzero` that does it."""
  x = block(low, 1e10)
  x[:, 2] = 0
  for keep in (False, True):
    format = formats.Float8(dtype, expand=expand, keep_nonzero=keep)
    seen = np.sign(round_trip(format, x))
    assert not np.any(seen[:, 2])
    assert np.array_equal(seen, np.sign(x)) == keep


def decode(dtype, numbers, scales):
  """The values of numbers of the dtype in an expanded block."""
  like = jax.ShapeDtypeStruct(numbers.shape, jnp.float32)
  codes = jnp.asarray(numbers.astype(DTYPES[dtype]))
  seen = formats.Float8(dtype).decode(formats.Block(codes, scales), like)
  return np.asarray(seen, np.float64)


@both_dtypes
@pytest.mark.parametrize('octaves', [0.5, 3, 12, 30, 100])
def test_values_of_codes_are_powers(dtype, octaves):
  """Derived: M (code / F)^(1/k), with the k of the paper, in float32."""
  stored, _ = store(formats.Float8(dtype), block(2.0**-octaves, 1.0))
  numbers = np.resize(NUMBERS[dtype], (8, BLOCK))
  k = exponent(dtype, 2.0**-octaves, 1.0)
  values = tables.power(numbers / NUMBERS[dtype][-1], 1 / k)
  error = np.abs(decode(dtype, numbers, stored.scales) - values)
  assert np.all(error <= POWERS * values)


@both_dtypes
@pytest.mark.parametrize('largest', [1.0, 1.0001, 1.2345678, 3.4e38])
def test_the_largest_is_rounded_up_to_bfloat16(dtype, largest):
  """Exact, and the largest bfloat16 is the end: nothing becomes infinite."""
  x = block(largest / 4, largest)
  stored, seen = store(formats.Float8(dtype), x)
  last = np.full(x.shape, NUMBERS[dtype][-1])
  up = tables.rounded_up(np.full(x.shape, largest))
  chex.assert_trees_all_equal(decode(dtype, last, stored.scales), up)
  chex.assert_tree_all_finite((seen, stored.codes.astype(jnp.float32)))


def half_bins(dtype, x, k):
  """Half of what is from x to the next code, at most.

  A step of the mantissa over k. As F is 7/4 of a power of two, steps of
  fractions of it are up to 8/7 as large.
  """
  step = {'e4m3': 2**-3, 'e5m2': 2**-2}[dtype] * 8 / 7 / k
  size = np.abs(x.astype(np.float64))
  mantissa, binade = np.frexp(size)
  log = binade + 2 * mantissa - 2 + step  # linear between powers of two
  whole = np.floor(log)
  return (np.ldexp(1 + log - whole, whole.astype(int)) - size) / 2


@both_dtypes
def test_one_small_value_does_not_collapse_the_expansion(dtype):
  """Derived: the others are as if k were 1/2, where COAT's would be 3/16.

  A zero changes none of them.
  """
  format, x = formats.Float8(dtype), block(1.0, 4.0)
  beside, others = x.copy(), np.arange(BLOCK) != 5
  beside[:, 5] = 0
  alone = x.copy()
  alone[:, 5] = x[:, 4]
  chex.assert_trees_all_equal(
    round_trip(format, beside)[:, others], round_trip(format, alone)[:, others]
  )
  beside[:, 5] = 1e-30
  seen = round_trip(format, beside)
  limit = half_bins(dtype, x, 1 / 2) + POWERS * np.abs(x)
  assert np.all((np.abs(seen - x) <= limit)[:, others])
  assert np.all(seen[:, 5] > 0)


@both_dtypes
def test_expansion_is_worth_it(dtype):
  """Claim: COAT's moments span a few octaves, where it saves half the error."""
  x = block(1.0, 8.0)
  errors = [
    np.abs(round_trip(formats.Float8(dtype, expand=expand), x) - x).mean()
    for expand in (True, False)
  ]
  assert errors[0] < errors[1] / 2


@both_dtypes
def test_equal_values(dtype):
  """Derived: k is at most 255/16, so that bins are a sixteenth as wide."""
  x = (
    np.full((8, BLOCK), 0.3, np.float32) * np.arange(1, 9, dtype='f4')[:, None]
  )
  error = np.abs(round_trip(formats.Float8(dtype), x) - x)
  assert np.all(error <= half_bins(dtype, x, 255 / 16) + POWERS * x)


@both_dtypes
@pytest.mark.parametrize('size', [3e38, 1e-36])
def test_scales_at_the_ends_of_float32(dtype, size):
  """Derived: roundings, as it is the scale; under jit the least, it may be.

  Some versions of XLA multiply by 1 / 3e38 or by 1e-36 / 448: no normal number,
  so that it is flushed. What is not zero is kept as the smallest code's value.
  """
  x = np.full((8, BLOCK), size, np.float32)
  format = formats.Float8(dtype, expand=False)
  smallest = NUMBERS[dtype][1] / NUMBERS[dtype][-1]
  least = max(smallest * size, 2.0**-126)

  def near(seen, x):
    return np.abs(np.asarray(seen, np.float64) - x) <= ROUNDINGS * x

  assert np.all(near(format.decode(format.encode(x), x), x))
  seen = round_trip(format, x)
  assert np.all(near(seen, x) | near(seen, least))


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'dtype': 'e3m4'}, "`dtype` must be one of ('e4m3', 'e5m2'); got 'e3m4'."),
    ({'dtype': jnp.float8_e4m3fn}, '`dtype` must be one of'),
    ({'block_size': 0}, '`block_size` must be an integer, 2 or more; got 0.'),
    ({'rounding': 'up'}, "`rounding` must be one of ('nearest', 'stochastic')"),
  ],
  ids=str,
)
def test_wrong_arguments(arguments, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    formats.Float8(**arguments)
