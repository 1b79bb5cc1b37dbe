# SPDX-License-Identifier: Apache-2.0
"""float16 and its residual: exact where promised, within a bound below it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_mp import formats
from optax_mp.formats import _rounding

# float32 words of 2^-14, the smallest normal float16, and of 65504, the largest
NORMAL, LARGEST = 0x38800000, 0x477FE000
# From here on the nearest float16 is infinity: 65504 and half a place.
OVERFLOW = LARGEST + 0x1000


@functools.partial(jax.jit, static_argnums=0)
def encode(format, words, key=None):
  """Takes words: NumPy and XLA read subnormals of float32 differently."""
  return format.encode(jax.lax.bitcast_convert_type(words, jnp.float32), key)


@functools.partial(jax.jit, static_argnums=0)
def decode(format, stored):
  shape = jax.tree.leaves(stored)[0].shape
  return format.decode(stored, jax.ShapeDtypeStruct(shape, jnp.float32))


def there_and_back(format, words, key=None):
  words = jnp.asarray(words, jnp.uint32)
  return np.asarray(decode(format, encode(format, words, key)))


def value(words):
  """Words -> float64, in which all differences here are exact."""
  return np.asarray(words, np.uint32).view(np.float32).astype(np.float64)


def every_binade():
  """A dense subset of all normal float16s' range, both signs, up to 65504.

  All 1024 leading mantissas beside the ties, what is next to them and some
  low bits; the numbers just below a power of two are among them.
  """
  low = np.array([0, 1, 2, 0xFFE, 0xFFF, 0x1000, 0x1001, 0x1FFE, 0x1FFF])
  low = np.append(low, np.random.default_rng(0).integers(0, 2**13, 7))
  exponent = np.arange(30)[:, None, None] << 23
  words = NORMAL + exponent + (np.arange(2**10) << 13)[:, None] + low
  words = words[words <= LARGEST].astype(np.uint32)
  return np.concatenate([words, words | 0x80000000])


def below_normal():
  """Words from 0 to 2^-14, float16's subnormals and what underflows them."""
  words = np.linspace(0, NORMAL - 1, 2**17).astype(np.uint32)
  return np.concatenate([words, words | 0x80000000])


def test_widen_is_exact_for_every_float16():
  halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
  wanted = halves.astype(np.float32)
  seen = np.asarray(jax.jit(_rounding.widen)(halves))
  number = ~np.isnan(wanted)
  chex.assert_trees_all_equal(
    seen[number].view(np.uint32), wanted[number].view(np.uint32)
  )
  assert np.all(np.isnan(seen[~number]))


@pytest.mark.parametrize('rounding', ['nearest', 'stochastic'])
def test_every_float16_is_kept(rounding):
  """Exact: without a residual, with any key."""
  halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
  words = halves.astype(np.float32).view(np.uint32)
  seen = encode(formats.Float16(rounding), words, jax.random.key(0))
  chex.assert_trees_all_equal(np.asarray(seen), halves)


@pytest.mark.parametrize('binade', [0x3F800000, 0xBF800000, NORMAL], ids=hex)
def test_exact_for_all_mantissas_of_a_binade(binade):
  """Exact, and from each `high` to the next: the half is NumPy's."""
  words = np.uint32(binade) + np.arange(2**23, dtype=np.uint32)
  stored = encode(formats.SplitFloat16(16), words)
  seen = np.asarray(decode(formats.SplitFloat16(16), stored))
  chex.assert_trees_all_equal(seen.view(np.uint32), words)
  wanted = words.view(np.float32).astype(np.float16)
  chex.assert_trees_all_equal(np.asarray(stored.high), wanted)


def test_exact_in_every_binade():
  words = every_binade()
  seen = there_and_back(formats.SplitFloat16(16), words)
  chex.assert_trees_all_equal(seen.view(np.uint32), words)


def test_exact_up_to_infinity():
  """What is above 65504 and rounds to it has a residual like any other."""
  words = np.arange(LARGEST, OVERFLOW, dtype=np.uint32)
  seen = there_and_back(formats.SplitFloat16(16), words)
  chex.assert_trees_all_equal(seen.view(np.uint32), words)


def code_step(words, largest):
  """A step of the fraction: half a place of the float16, over `largest`."""
  x = np.asarray(words, np.uint32).view(np.float32)
  with np.errstate(over='ignore'):
    half = np.abs(x.astype(np.float16)).view(np.uint16)
  exponent = np.maximum(half >> 10, 1).astype(np.int64)
  return np.ldexp(1.0, exponent - 15 - 11) / largest


@pytest.mark.parametrize(
  ('format', 'largest', 'steps'),
  [
    (formats.SplitFloat16(16), 32767, 0.5),
    (formats.SplitFloat16(8), 127, 0.5),
    (formats.SplitFloat16(16, 'stochastic'), 32767, 1.0),
    (formats.SplitFloat16(8, 'stochastic'), 127, 1.0),
  ],
  ids=repr,
)
@pytest.mark.parametrize('words', [every_binade, below_normal])
def test_error_is_part_of_a_step(format, largest, steps, words):
  """Derived: half a step of the fraction, or a whole one, and one rounding.

  The rounding is that of the sum, to float32: half a unit in its last place,
  2^-24 of it. It is taken four times, for that of the fraction as well.
  """
  words = words()
  x = value(words)
  seen = there_and_back(format, words, jax.random.key(0)).astype(np.float64)
  limit = steps * code_step(words, largest) + 4 * 2.0**-24 * np.abs(x)
  assert np.all(np.abs(seen - x) <= limit)


@pytest.mark.parametrize('bits', [16, 8])
def test_overflow_and_infinity_have_no_residual(bits):
  words = np.array([OVERFLOW, 0x7F7FFFFF, 0x7F800000], np.uint32)
  words = np.concatenate([words, words | 0x80000000])
  stored = encode(formats.SplitFloat16(bits), words)
  wanted = np.repeat([np.inf, -np.inf], 3)
  chex.assert_trees_all_equal(np.asarray(stored.high, np.float64), wanted)
  chex.assert_trees_all_equal(np.asarray(stored.low), np.zeros(6))
  seen = decode(formats.SplitFloat16(bits), stored)
  chex.assert_trees_all_equal(np.asarray(seen, np.float64), wanted)


@pytest.mark.parametrize('bits', [16, 8])
def test_residual_is_symmetric_and_bounded(bits):
  """-128 and -32768 are no codes: the fraction goes from -1 to 1."""
  largest = {16: 32767, 8: 127}[bits]
  words = np.concatenate([every_binade(), below_normal()])
  for rounding in ('nearest', 'stochastic'):
    format = formats.SplitFloat16(bits, rounding)
    low = np.asarray(encode(format, words, jax.random.key(1)).low, np.int64)
    assert low.min() == -largest and low.max() == largest


def test_nearest_is_that_of_numpy():
  """Exact, subnormals and ties to even among them."""
  words = np.concatenate([every_binade(), below_normal()])
  seen = np.asarray(encode(formats.Float16(), words))
  wanted = words.view(np.float32).astype(np.float16)
  chex.assert_trees_all_equal(seen.view(np.uint16), wanted.view(np.uint16))


SAMPLES = {
  'normal': 1.0003,
  'negative': -1.0007,
  'large': 60000.3,
  'binade-below': 1 - 2.0**-13,  # its nearest float16 is 1, in the next binade
  'just-below-two': -(2 - 2.0**-12),
  'smallest-normal': 2.0**-14 - 2.0**-27,
  'subnormal': 3.14e-6,
  'last-subnormal': 1.3 * 2.0**-24,
  'underflow': -0.3 * 2.0**-24,
}


@pytest.mark.parametrize('x', SAMPLES.values(), ids=SAMPLES)
def test_stochastic_rounding_is_unbiased(x):
  """Statistical, with the exact sigma of a choice between two float16s.

  The two are one place apart, or two where x is in the binade below.
  """
  n, x = 2**16, np.float32(x)
  words = np.full(n, x.view(np.uint32))
  drawn = encode(formats.Float16('stochastic'), words, jax.random.key(2))
  drawn = np.asarray(drawn, np.float64)
  below, above = drawn.min(), drawn.max()
  place = 2 * 127 * code_step(words[0], 127)
  assert below < x < above and above - below <= place
  assert set(np.unique(drawn)) == {below, above}
  sigma = np.sqrt((x - below) * (above - x))
  assert np.abs(drawn.mean() - x) <= 5 * sigma / np.sqrt(n)


@pytest.mark.parametrize('x', SAMPLES.values(), ids=SAMPLES)
def test_stochastic_residual_is_unbiased(x):
  """Statistical; a float32 rounding of each outcome is no noise: derived."""
  n, x = 2**16, np.float32(x)
  words = np.full(n, x.view(np.uint32))
  format = formats.SplitFloat16(8, 'stochastic')
  drawn = there_and_back(format, words, jax.random.key(2)).astype(np.float64)
  sigma = code_step(words[0], 127) / 2
  limit = 5 * sigma / np.sqrt(n) + 2.0**-24 * np.abs(x)
  assert np.abs(drawn.mean() - x) <= limit


@pytest.mark.parametrize('factory', [formats.Float16, formats.BFloat16])
def test_wrong_rounding(factory):
  with pytest.raises(ValueError, match='`rounding` must be one of .*got 1'):
    factory(1)


@pytest.mark.parametrize(
  ('arguments', 'name'), [((32,), 'residual_bits'), ((8, 'up'), 'rounding')]
)
def test_wrong_arguments(arguments, name):
  with pytest.raises(ValueError, match=f'`{name}` must be one of .*; got '):
    formats.SplitFloat16(*arguments)
