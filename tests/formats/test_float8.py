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
  exact = table.astype(np.float32)
  chex.assert_trees_all_equal(np.asarray(numbers.code(exact)), codes)
  below = np.nextafter(exact[1:], np.float32(0))
  chex.assert_trees_all_equal(np.asarray(numbers.code(below)), codes[:-1])


@both_dtypes
def test_codes_are_those_of_a_cast(dtype):
  """Exact, but for values that are some roundings from the middle of two."""
  format = formats.Float8(dtype, expand=False, keep_nonzero=False)
  table = NUMBERS[dtype]
  x = np.concatenate(
    [np.linspace(0, table[-1], 2**15), np.geomspace(table[1] / 8, table[-1], 2**15)]
  )
  x = np.resize(np.concatenate([x, -x]), (1032, BLOCK - 1))
  x = np.pad(x, [(0, 0), (0, 1)], constant_values=table[-1]).astype('f4')
  stored, _ = store(format, x)
  chex.assert_trees_all_equal(stored.scales, np.full((1032, 1), table[-1], 'f4'))
  assert stored.codes.dtype == DTYPES[dtype]
  middles = (table[1:] + table[:-1]) / 2
  size = np.abs(x.astype(np.float64))
  low, high = (
    np.searchsorted(middles, size * (1 + way)) for way in (-ROUNDINGS, ROUNDINGS)
  )
  tie = low != high
  seen = np.asarray(stored.codes).astype(np.float32)
  cast = x.astype(DTYPES[dtype]).astype(np.float32)
  chex.assert_trees_all_equal(seen[~tie], cast[~tie])
  near = (table[low] <= np.abs(seen)) & (np.abs(seen) <= table[high])
  assert np.all(near) and np.count_nonzero(tie) < x.size / 500


@both_dtypes
@pytest.mark.parametrize('expand', [True, False])
def test_what_is_not_zero_stays_so(dtype, expand):
  """Exact, with its sign; and it is `keep_nonzero` that does it."""
  x = block(1e-30, 1e10)
  x[:, 2] = 0
  for keep in (True, False):
    format = formats.Float8(dtype, expand=expand, keep_nonzero=keep)
    seen = np.sign(round_trip(format, x))
    assert np.array_equal(seen, np.sign(x)) == keep
    assert not np.any(seen[:, 2])


@both_dtypes
@pytest.mark.parametrize('octaves', [0.5, 3, 12, 30, 100])
def test_values_of_codes_are_powers(dtype, octaves):
  """Derived: M (code / F)^(1/k), with the k of the paper, in float32."""
  x = block(2.0**-octaves, 1.0)
  stored, _ = store(formats.Float8(dtype), x)
  table = NUMBERS[dtype]
  codes = np.resize(table, (8, BLOCK)).astype(DTYPES[dtype])
  seen = formats.Float8(dtype).decode(
    formats.Block(jnp.asarray(codes), stored.scales), like(codes)
  )
  k = exponent(dtype, 2.0**-octaves, 1.0)
  values = tables.power(table / table[-1], 1 / k)
  values = np.resize(values, (8, BLOCK))
  assert np.all(np.abs(np.asarray(seen, np.float64) - values) <= POWERS * values)


def like(x):
  return jax.ShapeDtypeStruct(x.shape, jnp.float32)


@both_dtypes
@pytest.mark.parametrize('octaves', [0.5, 3, 12])
def test_a_block_fills_the_dtype(dtype, octaves):
  """Derived: k is cut off to sixteenths; the smallest is at 2 / F or above.

  F^2 / 2 is the range that is aimed at, in octaves; a sixteenth of k is worth
  1 / (16 k) of it, and the word is off the logarithm by up to 0.09 octaves.
  """
  x = block(2.0**-octaves, 1.0)
  codes = np.abs(np.asarray(store(formats.Float8(dtype), x)[0].codes, np.float32))
  largest = NUMBERS[dtype][-1]
  assert np.all(codes.max(1) == largest)
  k = exponent(dtype, 2.0**-octaves, 1.0)
  reach = np.log2(largest**2 / 2)
  spent = np.log2(largest / codes.min(1))
  bin = 2**-2 if dtype == 'e5m2' else 2**-3
  slack = np.log2(1 + bin) + 2 * 0.09 * max(1, k)
  unspent = 0 if k < 255 / 16 else reach
  assert np.all(spent <= reach + slack)
  assert np.all(spent >= reach * (1 - 1 / (16 * k)) - slack - unspent)


@both_dtypes
@pytest.mark.parametrize('top', [1.0, 1.0001, 1.2345678, 3.4e38])
def test_the_largest_is_rounded_up_to_bfloat16(dtype, top):
  """Derived: 2^-8 of it or less, but the largest bfloat16 is the end."""
  x = block(top / 4, top)
  stored, seen = store(formats.Float8(dtype), x)
  largest = np.asarray(jnp.full(x.shape, NUMBERS[dtype][-1]).astype(DTYPES[dtype]))
  values = formats.Float8(dtype).decode(
    formats.Block(jnp.asarray(largest), stored.scales), like(x)
  )
  values = np.asarray(values)
  chex.assert_trees_all_equal(values.astype(jnp.bfloat16).astype('f4'), values)
  rounded_up = tables.rounded_up(np.full(x.shape, top))
  chex.assert_trees_all_equal(values.astype(np.float64), rounded_up)
  chex.assert_tree_all_finite((seen, stored.codes.astype(jnp.float32)))


def half_bins(dtype, x, k):
  """Half the distance of two codes at x: a step of the mantissa over k."""
  size = np.abs(x.astype(np.float64))
  words = np.log2(1 + {'e4m3': 2**-3, 'e5m2': 2**-2}[dtype])
  step = {'e4m3': 2**-3, 'e5m2': 2**-2}[dtype] / k
  del words
  mantissa, binade = np.frexp(size)
  # Linear logarithms: 2^-3 of an octave of words is a step of e4m3.
  log = binade + 2 * mantissa - 2 + step
  whole = np.floor(log)
  return (np.ldexp(1 + log - whole, whole.astype(int)) - size) / 2
