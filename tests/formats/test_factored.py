# SPDX-License-Identifier: Apache-2.0
"""Factored: arrays of rank 1, sums, and what is no number."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_mp import formats

FORMAT = formats.Factored()


@functools.partial(jax.jit, static_argnums=0)
def store(format, x):
  stored = format.encode(x)
  return stored, format.decode(stored, x)


def round_trip(x):
  return np.asarray(store(FORMAT, x)[1], np.float64)


def uniform(*shape):
  return np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)


def roundings(x):
  """Derived: of three means of float32, in any order, and two products."""
  return (sum(x.shape[-2:]) + 4) * 2.0**-23


@pytest.mark.parametrize('shape', [(16, 32), (3, 8, 5), (1, 7), (7, 1)])
def test_what_has_rank_one_is_exact(shape):
  """Exact: means of equal powers of two are not rounded; else derived."""
  equal = np.full(shape, 0.25, np.float32)
  chex.assert_trees_all_equal(round_trip(equal), equal.astype(np.float64))
  x = uniform(*shape[:-1], 1) * uniform(shape[-1])
  assert np.all(np.abs(round_trip(x) - x) <= roundings(x) * x)


def test_stored_are_the_means():
  """Derived: roundings."""
  x = uniform(3, 8, 5)
  stored, _ = store(FORMAT, x)
  wanted = formats.Factors(x.mean(-1), x.mean(-2))
  chex.assert_trees_all_close(stored, wanted, rtol=roundings(x))
  chex.assert_shape(stored, [(3, 8), (3, 5)])
  chex.assert_type(stored, jnp.float32)


@pytest.mark.parametrize('shape', [(16, 32), (3, 8, 5)], ids=str)
def test_sums_of_rows_and_columns_are_kept(shape):
  """Derived: roundings."""
  x = uniform(*shape)
  seen = round_trip(x)
  for axis in (-1, -2):
    chex.assert_trees_all_close(
      seen.sum(axis), x.astype('f8').sum(axis), rtol=roundings(x)
    )


def test_no_array_of_rank_one_is_nearer():
  """Exact: the Kullback-Leibler divergence of any other is larger."""
  x, rng = uniform(6, 9).astype(np.float64) + 0.1, np.random.default_rng(1)
  seen = round_trip(x.astype(np.float32))

  def divergence(y):
    return np.sum(x * np.log(x / y) - x + y)

  for _ in range(20):
    rows, columns = (np.exp(0.1 * rng.standard_normal(n)) for n in x.shape)
    assert divergence(seen * np.outer(rows, columns)) > divergence(seen)


def test_averages_of_what_is_stored_are_those_of_the_arrays():
  """Derived: roundings. An average of g^2 is kept as Adafactor keeps it."""
  x, y = uniform(2, 16, 8)
  mixed = FORMAT.encode(0.9 * x + 0.1 * y)
  stored = jax.tree.map(
    lambda a, b: 0.9 * a + 0.1 * b, FORMAT.encode(x), FORMAT.encode(y)
  )
  chex.assert_trees_all_close(mixed, stored, rtol=roundings(x))


def test_each_matrix_of_a_stack_has_its_own():
  """Exact."""
  x = uniform(3, 8, 5)
  other = x * np.array([1, 1e3, 0], np.float32)[:, None, None]
  chex.assert_trees_all_equal(round_trip(other)[0], round_trip(x)[0])
  assert not np.any(round_trip(other)[2])


@pytest.mark.parametrize('scale', [1e-36, 1e-20, 1e20, 1e36])
def test_products_of_means_neither_underflow_nor_overflow(scale):
  """Derived: roundings."""
  x = np.full((16, 8), scale, np.float32)
  assert np.all(np.abs(round_trip(x) - x) <= roundings(x) * x)


def test_empty_rows_stay_empty():
  """Exact: and beside others that are large there is no NaN."""
  x = uniform(8, 4) * np.float32(1e20)
  x[3], x[:, 1] = 0, 0
  chex.assert_trees_all_equal(round_trip(x) > 0, x > 0)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -1.0], ids=str)
def test_a_value_that_is_no_second_moment_is_left_out_of_the_means(bad):
  """Exact for itself and the next matrix; derived for its own: three means."""
  x = np.full((2, 8, 4), 0.25, np.float32)
  x[0, 3, 2] = bad
  seen = np.array(round_trip(x))
  np.testing.assert_array_equal(seen[0, 3, 2], np.nan if bad < 0 else bad)
  seen[0, 3, 2] = 0.25
  np.testing.assert_allclose(seen[0], 0.25, rtol=2**-20)
  assert np.all(seen[1] == 0.25)


@pytest.mark.parametrize('value', [8e35, np.finfo(np.float32).max])
def test_a_matrix_of_huge_values_stays_finite(value):
  """Derived: two means, though the sum of all means overflows."""
  seen = np.asarray(round_trip(np.full((512, 512), value, np.float32)))
  np.testing.assert_allclose(seen, value, rtol=2**-20)


@pytest.mark.parametrize('bad', [np.nan, np.inf], ids=str)
def test_huge_values_beside_what_is_no_number_in_the_only_row(bad):
  """Derived: two means of the row, which no other row tells anything about."""
  x = np.zeros((4, 128), np.float32)
  x[0] = 1e30
  x[0, 0] = bad
  seen = np.asarray(round_trip(x))
  np.testing.assert_allclose(seen, x, rtol=2**-20)


@pytest.mark.parametrize('shape', [(), (5,)], ids=str)
def test_vectors_are_refused(shape):
  message = r'`x` must have two axes or more for `Factored`; got shape \('
  with pytest.raises(ValueError, match=message):
    FORMAT.encode(jnp.ones(shape))
