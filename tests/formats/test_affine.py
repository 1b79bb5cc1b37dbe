# SPDX-License-Identifier: Apache-2.0
"""What is special to `formats.Affine`, beside its laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_mp import formats


def stored(x, **settings):
  format = formats.Affine(**settings)
  kept = jax.jit(format.encode)(x)
  return kept, np.asarray(format.decode(kept, x))


def test_codes_are_equal_steps_between_the_ends():
  """Exact: of 16 values that are on the grid, in either width."""
  x = jnp.arange(16.0) * 0.5 - 3
  for dtype in ('bfloat16', 'float32'):
    kept, seen = stored(x, block_size=16, stats_dtype=dtype)
    assert np.asarray(kept.codes, np.int32).tolist() == list(range(-8, 8))
    assert [float(end[0]) for end in kept.scales] == [-3.0, 4.5]
    np.testing.assert_array_equal(seen, x)


def test_halves_are_rounded_up():
  """Exact: floor(x + 1/2)."""
  x = jnp.array([0.0, 0.5, 1.5, 2.5, 15.0])
  kept, _ = stored(x, block_size=5, stats_dtype='float32')
  assert np.asarray(kept.codes, np.int32).tolist() == [-8, -7, -6, -5, 7]


def test_the_last_block_of_one_axis_is_shorter():
  """Exact; each block is what it would be alone."""
  x = jax.random.normal(jax.random.key(0), (37,))
  kept, seen = stored(x, block_size=8)
  assert kept.scales[0].shape == (5,)
  for i in range(0, 37, 8):
    _, alone = stored(x[i : i + 8], block_size=8)
    np.testing.assert_array_equal(seen[i : i + 8], alone)


def test_bfloat16_ends_are_beyond_all_values():
  x = 100 + jax.random.normal(jax.random.key(1), (64, 128))
  x = x * jnp.where(jnp.arange(64) % 2, -1.0, 1.0)[:, None]
  kept, _ = stored(x)
  low, high = (np.asarray(end, np.float32) for end in kept.scales)
  blocks = np.asarray(x).reshape(64, 2, 64)
  assert np.all(low <= blocks.min(-1)) and np.all(high >= blocks.max(-1))
  # kind: derived, one bfloat16 ulp.
  assert np.all(blocks.min(-1) - low <= 2.0**-7 * np.abs(low))


@pytest.mark.parametrize('bits', [4, 8])
def test_equal_values_are_exact_where_the_ends_are(bits):
  x = jnp.full((8, 128), 0.3)
  kept, seen = stored(x, bits=bits, stats_dtype='float32')
  np.testing.assert_array_equal(seen, x)
  lowest = -8 if bits == 4 else 0
  assert np.all(np.asarray(kept.codes, np.int32) == lowest)


@pytest.mark.parametrize(('bits', 'range'), [(4, 2.0**-122), (8, 2.0**-118)])
def test_how_small_a_range_may_be(bits, range):
  """Ends come back; of half that range the smallest value does alone."""
  for low in (0.0, -range / 2):
    x = jnp.array([low, low + range])
    settings = {'bits': bits, 'block_size': 2, 'stats_dtype': 'float32'}
    _, seen = stored(x, **settings)
    # kind: derived, the fewer bits of the step.
    np.testing.assert_allclose(seen, x, rtol=0.0, atol=range * 2.0**-15)
    _, seen = stored(x / 2, **settings)
    np.testing.assert_array_equal(seen, np.full(2, low / 2, np.float32))


def test_values_that_are_not_normal_are_zeros():
  x = jnp.asarray(np.array([2.0**-127, -(2.0**-130)] * 2, np.float32))
  for dtype in ('bfloat16', 'float32'):
    _, seen = stored(x, block_size=2, stats_dtype=dtype)
    np.testing.assert_array_equal(seen, np.zeros(4))


def test_eight_bits():
  """Derived: half a step."""
  x = jax.random.normal(jax.random.key(2), (16, 128))
  kept, seen = stored(x, bits=8, stats_dtype='float32')
  assert kept.codes.dtype == jnp.uint8
  blocks = np.asarray(x).reshape(16, 2, 64)
  half = np.ptp(blocks, -1)[..., None] / 255 / 2 * (1 + 2.0**-7)
  assert np.all(np.abs(seen.reshape(16, 2, 64) - blocks) <= half)


@pytest.mark.parametrize(
  ('wrong', 'argument'),
  [({'bits': 2}, 'bits'), ({'block_size': 1}, 'block_size'),
   ({'stats_dtype': 'float16'}, 'stats_dtype')],
)  # fmt: skip
def test_errors_name_the_argument(wrong, argument):
  with pytest.raises(ValueError, match=f'`{argument}`.*got'):
    formats.Affine(**wrong)


@pytest.mark.parametrize('stats_dtype', ['bfloat16', 'float32'])
def test_blocks_at_the_ends_of_float32_stay_finite(stats_dtype):
  """Derived: half a code of a range cut at 2^126; a mark takes three codes."""
  format = formats.Affine(4, stats_dtype=stats_dtype)
  end = np.float32(2.0**126)
  signs = np.where(np.arange(64) % 2, 1.0, -1.0).astype(np.float32)
  for x in (3e38 * signs, -3.4e38 * np.ones(64, np.float32)):
    for marked in (False, True):
      x = np.concatenate([x[:63], [np.inf]]) if marked else x
      x = x.astype(np.float32)[None]
      seen = np.asarray(format.decode(format.encode(x), x))
      np.testing.assert_array_equal(np.isinf(seen), np.isinf(x))
      finite = np.isfinite(x)
      error = np.abs(seen - np.clip(x, -end, end))[finite]
      assert error.max() <= 2 * end / 12 / 2 * (1 + 2**-16)
      x = x[0]
