# SPDX-License-Identifier: Apache-2.0
"""ErrorFeedback: two formats are better than either, and no sign is lost."""

import functools

import chex
import jax
import numpy as np
import pytest

from optax_mp import formats
import tables

INT = formats.BlockInt
ROUNDINGS = 2.0**-20  # eight units in the last place of a float32
PAIRS = {
  'sqrt': formats.ErrorFeedback(INT(8), INT(4)),
  'log': formats.ErrorFeedback(INT(8, False), INT(4)),
  'log-4': formats.ErrorFeedback(INT(4, False), INT(4)),
  'linear-unsigned': formats.ErrorFeedback(INT(4, False, 'linear'), INT(4)),
  'dynamic-unsigned': formats.ErrorFeedback(INT(8, False, 'dynamic'), INT(4)),
  'e4m3': formats.ErrorFeedback(formats.Float8(), INT(4)),
  'bfloat16': formats.ErrorFeedback(formats.BFloat16(), INT(8)),
}
over_pairs = pytest.mark.parametrize('pair', PAIRS.values(), ids=PAIRS)
over_unsigned = pytest.mark.parametrize(
  'pair', [p for p in PAIRS.values() if not getattr(p.format, 'signed', True)]
)


@functools.partial(jax.jit, static_argnums=0)
def store(format, x, key=None):
  stored = format.encode(x, key)
  return stored, format.decode(stored, x)


def error(format, x, key=None):
  return np.asarray(store(format, x, key)[1], np.float64) - x


def moments(pair, shape=(16, 256)):
  """Gradients, or their squares where there are no signs."""
  x = np.random.default_rng(0).standard_normal(shape)
  return (x if getattr(pair.format, 'signed', True) else x**2).astype('f4')


def rms(x):
  return np.sqrt(np.mean(x**2))


@over_pairs
def test_it_is_better_than_either(pair):
  """Claim: four bits more take away three quarters of the error."""
  x = moments(pair)
  alone = [error(format, x) for format in (pair.format, pair.residual)]
  assert rms(error(pair, x)) < min(map(rms, alone)) / 4


@pytest.mark.parametrize('name', ['sqrt', 'log', 'dynamic-unsigned', 'e4m3'])
def test_it_is_the_sum_of_what_both_store(name):
  """Derived: roundings; of a format with bins in proportion, the product."""
  pair, x = PAIRS[name], moments(PAIRS[name])
  stored, seen = store(pair, x)
  chex.assert_trees_all_equal(stored.value, store(pair.format, x)[0])
  value = np.asarray(pair.format.decode(stored.value, x), np.float64)
  rest = np.asarray(pair.residual.decode(stored.residual, x), np.float64)
  rest = rest * value if name in ('log', 'e4m3') else rest
  wanted = value + rest
  if name == 'dynamic-unsigned':
    wanted = np.where(value > 0, np.maximum(wanted, tables.TINY), value)
  limit = ROUNDINGS * (np.abs(value) + np.abs(rest))
  assert np.all(np.abs(np.asarray(seen) - wanted) <= limit)


@over_unsigned
@pytest.mark.parametrize('octaves', [2, 20, 100])
def test_second_moments_stay_positive(pair, octaves):
  """Exact: however coarse the residual of the block is."""
  x = 2.0 ** -np.random.default_rng(0).uniform(0, octaves, (16, 256))
  x[:, ::7] = 0
  x = x.astype(np.float32)
  seen = np.asarray(store(pair, x)[1])
  zero = pair.format == INT(4, False, 'linear')  # has no code for it
  chex.assert_trees_all_equal((seen > 0) | zero, (x > 0) | zero)
  assert np.all(seen[x > 0] > 0) and np.all(seen >= 0)


def test_factors_with_residuals_stay_positive():
  """Exact: a negative second moment has no square root."""
  x = np.exp(3 * np.random.default_rng(0).standard_normal((64, 64)))
  pair = formats.ErrorFeedback(formats.Factored(), INT(8))
  assert np.all(np.asarray(store(pair, x.astype(np.float32))[1]) > 0)


@pytest.mark.parametrize('name', ['log', 'log-4', 'e4m3'])
def test_ratios_are_as_good_for_small_values(name):
  """Derived: the widest bin of the residuals, times the largest ratio.

  Were residuals those of values, the largest values would set their scale.
  """
  pair, x = PAIRS[name], 10.0 ** -np.linspace(0, 4, 4096)
  x = np.random.default_rng(0).permutation(x).reshape(16, 256).astype('f4')
  alone = np.abs(error(pair.format, x)) / x
  widest = np.diff(tables.codes('sqrt', 7)).max() / 2
  ratios = alone / (1 - alone)  # to what is stored
  limit = widest * tables.largest(ratios) * (1 + alone) + ROUNDINGS
  assert np.all(np.abs(error(pair, x)) / x <= limit)


def test_residuals_may_have_residuals():
  """Claim: each four bits more take away three quarters of the error."""
  two = formats.ErrorFeedback(INT(4), INT(4))
  three = formats.ErrorFeedback(INT(4), formats.ErrorFeedback(INT(4), INT(4)))
  x = moments(two)
  assert rms(error(three, x)) < rms(error(two, x)) / 4 < rms(error(INT(4), x))


def test_both_draw_noise_of_their_own():
  """Statistical: the two errors are not correlated.

  Of 2^16 products of errors with a deviation of 1, the mean has one of 2^-8.
  """
  format = INT(4, map='linear', rounding='stochastic')
  pair = formats.ErrorFeedback(format, format)
  x = np.random.default_rng(0).uniform(-1, 1, (256, 256)).astype(np.float32)
  key = jax.random.key(0)
  stored, seen = store(pair, x, key)
  like = jax.ShapeDtypeStruct(x.shape, x.dtype)
  first = np.asarray(format.decode(stored.value, like), np.float64) - x
  second = np.asarray(seen, np.float64) - x
  mean = np.mean(first * second) / (rms(first) * rms(second))
  assert np.abs(mean) <= 5 * 2.0**-8


def test_notes_are_those_of_the_value():
  pair = PAIRS['sqrt']
  assert pair.note((12, 128)) == INT(8).note((12, 128)) != ''
  assert PAIRS['bfloat16'].note((12, 128)) == ''


@pytest.mark.parametrize('argument', ['format', 'residual'])
@pytest.mark.parametrize('value', [None, 8, INT, [INT(8)]], ids=repr)
def test_wrong_arguments(argument, value):
  arguments = {'format': INT(8), 'residual': INT(4)} | {argument: value}
  with pytest.raises(
    ValueError, match=f'`{argument}` must be a format such as'
  ):
    formats.ErrorFeedback(**arguments)


@pytest.mark.parametrize(
  'residual', [formats.BlockInt(4, signed=False), formats.Factored()]
)
def test_residuals_have_signs(residual):
  with pytest.raises(ValueError, match='`residual` must be a format with'):
    formats.ErrorFeedback(formats.BlockInt(8), residual)
