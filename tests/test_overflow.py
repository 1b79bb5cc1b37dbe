# SPDX-License-Identifier: Apache-2.0
"""Without a guard, one value that overflows costs its own parameter at most.

Every other value of its block, row or matrix goes on as if nothing had been.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import formats
import quick
import tables

VALUES = (1e19, 1e20, 3e38, np.inf, np.nan)
# Large, but the squares are no overflows. Above 3e15 a first moment, and above
# 9e15 a second one, counts as huge.
LARGE = (1e6, 1e9, 1e12, 1e15, 3e15, 1e16, 1e17, 1e18, 1e19)
# The first of a block, one within, the last; (rows, columns) of blocks of 128.
POSITIONS = ((0, 0), (3, 130), (15, 255))
RATE = 0.125
# 'ragged' has a scale a row, since 200 is no multiple of 128.
SHAPES = {'blocks': (16, 256), 'ragged': (16, 200), 'stack': (2, 16, 256)}
# float16 ends at 65504: it is no format for such moments. Formats without an
# exact zero, Affine, are refused for moments; see `test_format_laws.py`.
FORMATS = [
  name
  for name, row in tables.FORMATS.items()
  if row.high > 1e30 and getattr(row.format, 'exact_zero', True)
]
# How far from float32 the others may go in two steps, as a factor: by how much
# a code, or a matrix that is not of rank 1, may be off.
FACTORS = {'wide': 1.01, 'eight': 1.06, 'fp8': 1.25, 'four': 1.5, 'rank 1': 2.5}


def gradients(i, shape):
  """Of one sign, so that Adam moves every parameter by about a rate."""
  x = np.random.default_rng(i).uniform(0.5, 2.0, size=shape)
  return jnp.asarray(x, jnp.float32)


def stepping(tx):
  def step(params, state, gradients):
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  return tx, quick.jit(step)


@functools.cache
def stored(name):
  """Adam, the moment that a format is for in that format."""
  row = tables.FORMATS[name]
  rule = {'mu' if row.signed else 'nu': row.format}
  return stepping(optax_mp.compressed(optax.adam(RATE), rule, min_size=0))


@functools.cache
def bare(name):
  """Adam, all of its state in one format, if that has signs."""
  format = tables.FORMATS[name].format
  return stepping(optax_mp.compressed(optax.adam(RATE), format, min_size=0))


@functools.cache
def recipe(name):
  return stepping(getattr(optax_mp, name)(RATE, min_size=0))


@functools.cache
def plain():
  return stepping(optax.adam(RATE))


def after(run, shape, position, value, dtype=jnp.float32):
  """Parameters before and after the two steps that follow a bad gradient."""
  tx, step = run
  params = jnp.zeros(shape, dtype)
  given = [gradients(i, shape) for i in range(4)]
  given[1] = given[1].at[position].set(value)
  given = [g.astype(dtype) for g in given]
  carry = step(params, tx.init(params), given[0])
  before = carry = step(*carry, given[1])
  for g in given[2:]:
    carry = step(*carry, g)
  return np.asarray(before[0], np.float32), np.asarray(carry[0], np.float32)


def movement(steps, position):
  """How far a parameter moves in the two steps after its bad gradient."""
  before, now = steps
  return abs(float(before[position]) - float(now[position]))


def lost(params):
  return int(np.sum(~np.isfinite(params)))


def factor(format):
  """The key of FACTORS for a format."""
  if isinstance(format, formats.Factored):
    return 'rank 1'
  if isinstance(format, formats.Float8):
    return 'fp8'
  bits = formats.bits_per_value(format, (128, 128))
  return 'wide' if bits >= 12 else 'eight' if bits >= 8 else 'four'


def assert_others_go_on(steps, wanted, position, kind):
  """kind: claim. Each of them moves as in float32, up to the format's error."""
  others = np.ones(steps[0].shape, bool)
  others[position] = False
  moved, expected = ((before - now)[others] for before, now in (steps, wanted))
  assert np.all(expected > RATE), expected.min()
  ratio = moved / expected
  limit = FACTORS[kind]
  assert np.all((ratio > 1 / limit) & (ratio < limit)), (
    ratio.min(),
    ratio.max(),
  )


def at(shape, position):
  return (1,) * (len(shape) - 2) + tuple(
    min(i, n - 1) for i, n in zip(position, shape[-2:], strict=True)
  )


@pytest.mark.parametrize('kind', SHAPES)
@pytest.mark.parametrize('name', FORMATS)
def test_as_many_parameters_are_lost_as_in_float32(name, kind):
  """kind: exact, of counts."""
  shape = SHAPES[kind]
  for position in POSITIONS if kind == 'blocks' else POSITIONS[1:2]:
    for value in VALUES:
      where = at(shape, position)
      wanted = after(plain(), shape, where, value)
      steps = after(stored(name), shape, where, value)
      assert lost(steps[1]) == lost(wanted[1]) <= 1, (where, value)
      off = factor(tables.FORMATS[name].format)
      assert_others_go_on(steps, wanted, where, off)


@pytest.mark.parametrize(
  'name, off',
  [
    ('adamw_8bit', 'eight'),
    ('adamw_4bit', 'four'),
    ('coat_adamw', 'fp8'),
    ('flash_adamw', 'eight'),
  ],
)
def test_recipes_with_bfloat16_gradients(name, off):
  """kind: exact, of counts."""
  for value in VALUES:
    where = POSITIONS[1]
    wanted = after(plain(), SHAPES['blocks'], where, value)
    steps = after(recipe(name), SHAPES['blocks'], where, value, jnp.bfloat16)
    assert lost(steps[1]) == lost(wanted[1]), value
    assert_others_go_on(steps, wanted, where, off)


RUNS = [(stored, name, jnp.float32) for name in FORMATS]
RUNS += [
  (bare, name, jnp.float32) for name in FORMATS if tables.FORMATS[name].signed
]
RUNS += [
  (recipe, name, jnp.bfloat16)
  for name in ('adamw_8bit', 'adamw_4bit', 'coat_adamw', 'flash_adamw')
]
over_runs = pytest.mark.parametrize(
  ('run', 'dtype'),
  [
    pytest.param(
      functools.partial(make, name), dtype, id=f'{make.__name__}-{name}'
    )
    for make, name, dtype in RUNS
  ],
)


@pytest.mark.parametrize('value', [1e20, 3e38])
@over_runs
def test_the_weight_itself_freezes(run, dtype, value):
  """kind: exact. As in float32, where its second moment is infinite."""
  where = POSITIONS[1]
  shape = SHAPES['blocks']
  assert movement(after(plain(), shape, where, value), where) == 0
  assert movement(after(run(), shape, where, value, dtype), where) == 0


@over_runs
def test_the_weight_itself_moves_no_further(run, dtype):
  """kind: claim. A denominator that is too small would move it without limit.

  A huge value is stored as another one, with which the weight moves less. Four
  bits are up to half a code off, in each of the moments.
  """
  shape, where = SHAPES['blocks'], POSITIONS[1]
  for value in LARGE:
    wanted = movement(after(plain(), shape, where, value), where)
    moved = movement(after(run(), shape, where, value, dtype), where)
    assert moved <= 1.5 * wanted, (value, moved, wanted)


def test_formats_keep_what_is_no_number_to_itself():
  """kind: exact. Each comes back where it was, and there are no others.

  One block has both kinds. Factors mark rows and columns only, and so all of
  the crossings of two values in different rows.
  """
  x = gradients(0, (16, 256))
  bad = x.at[5, 7].set(jnp.nan)
  bad = bad.at[3, 130].set(jnp.inf).at[3, 140].set(jnp.nan)
  for name in FORMATS:
    format = tables.FORMATS[name].format
    key = jax.random.key(0)
    decoded = format.decode(format.encode(bad, key), x)
    number = 6 if isinstance(format, formats.Factored) else 3
    assert int(jnp.sum(~jnp.isfinite(decoded))) == number, name
    assert jnp.isposinf(decoded[3, 130]), name
    assert jnp.isnan(decoded[3, 140]) and jnp.isnan(decoded[5, 7]), name


# Their codes are divided by the largest one, which XLA may do to the scale.
DIVIDED = [
  formats.BlockInt(8, map='linear'),
  formats.BlockInt(8, signed=False, map='linear'),
  formats.Float8('e4m3', expand=False),
  formats.Float8('e5m2', expand=False),
  formats.Float8('e5m2', expand=False, signed=False),
]


@pytest.mark.parametrize('others', [0.0, 1e-37, 1e-20])
@pytest.mark.parametrize(
  'row',
  [
    *(tables.FORMATS[name] for name in FORMATS),
    *(tables.block(f, 8.25, None, signed=f.signed) for f in DIVIDED),
  ],
  ids=lambda row: str(row.format),
)
def test_a_mark_does_not_underflow(row, others):
  """kind: exact. XLA divides small scales by the largest code, and then more.

  A bad value beside zeros is usual: embeddings have rows without gradients.
  """
  for shape in ((7,), (128,), (8, 128), (16, 200)):
    if len(shape) < row.axes:
      continue
    both = quick.jit(
      lambda x, key: row.format.decode(row.format.encode(x, key), x)
    )
    for value in (np.inf, np.nan, 1e37):
      x = jnp.full(shape, others).at[(0,) * len(shape)].set(value)
      seen = np.asarray(both(x, jax.random.key(0)))
      first = seen.ravel()[0]
      wanted = np.isfinite(value) and (row.signed or first > 1e30)
      assert wanted or np.array_equal(first, value, equal_nan=True), (shape, x)
      # Without a code for zero, zeros beside 1e37 alone are 1/16 of it.
      if row.zero or others or not np.isfinite(value):
        assert np.abs(seen.ravel()[1:]).max() <= max(1e-30, 2 * others)


@pytest.mark.parametrize('name', tables.FORMATS)
def test_nothing_is_nan_on_the_way(name):
  """`jax_debug_nans` finds no NaN in programs that are not compiled."""
  row = tables.FORMATS[name]
  x = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, (16, 256)), 'f4')
  with jax.debug_nans(True):
    row.format.decode(row.format.encode(x, jax.random.key(0)), x)


@pytest.mark.parametrize('shape', [(), (1,), (7, 10), (1000, 1000)])
@pytest.mark.parametrize('name', ['sqrt-log-8-below', 'factored'])
def test_the_largest_numbers_stay_finite(name, shape):
  """The mean of ten is rounded up, and so is the product with a scale."""
  row = tables.FORMATS[name]
  if len(shape) < row.axes:
    pytest.skip('has no such arrays')
  x = jnp.full(shape, np.finfo(np.float32).max)
  both = jax.jit(
    lambda x: row.format.decode(row.format.encode(x, jax.random.key(0)), x)
  )
  assert jnp.isfinite(both(x)).all()


@pytest.mark.parametrize('residual', [formats.BlockInt(4), formats.BFloat16()])
@pytest.mark.parametrize('map', ['sqrt', 'linear', 'log'])
def test_a_huge_value_with_error_feedback(map, residual):
  """kind: exact. A residual near its negative would leave nothing of it."""
  format = formats.ErrorFeedback(
    formats.BlockInt(8, signed=False, map=map), residual
  )
  x = gradients(0, (16, 256)).at[3, 130].set(1e30)
  seen = format.decode(format.encode(x), x)
  assert seen[3, 130] == 2.0**120
  assert jnp.max(jnp.where(x > 2, 0.0, seen)) < 2.1
