# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/tracking.py`: its arithmetic, small, and what it has found."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import formats
import published
import results
import tracking

TINY = dataclasses.replace(
  tracking.CONFIG,
  layers=1,
  width=32,
  heads=2,
  context=8,
  batch=2,
  steps=4,
  warmup=2,
  b2=0.999,
)
EXACT = 'in 32 bits'
PAIRS = {
  EXACT: {'mu': formats.Split(16), 'nu': formats.Split(16)},
  'adamw_8bit': tracking.PAIRS['adamw_8bit'],
}


@functools.cache
def _run():
  return tracking.track(TINY, PAIRS)


def test_exact_formats_have_no_error():
  """But for what a compiler fuses in another way."""
  for row in _run()['pairs'][EXACT].values():
    off = ('update', 'stored', 'stored, eps 1e-12', 'drift', 'nu', 'nu bias')
    found = [row[name] for name in (*off, 'nu zeroed')]
    np.testing.assert_allclose(found, 0, atol=1e-6)
    np.testing.assert_allclose([row['cosine'], row['gain']], 1, rtol=1e-4)


def test_what_is_reported():
  run = _run()
  assert run['steps'] == 4 and math.isfinite(run['loss'])
  assert list(run['pairs']) == list(PAIRS)
  # A row of the smallest QKV has one scale for queries and values, which differ
  # most in the first steps.
  most = {'embedding': 0.02, 'MLP in': 0.02, 'QKV': 0.3}
  for name, row in run['pairs']['adamw_8bit'].items():
    assert 0 < row['update'] < row['stored'] < most[name]
    assert row['nu zeroed'] == 0


def test_float32_is_adamw():
  """Exact but for the order of operations: Optax's moments and updates."""
  keys = jax.random.split(jax.random.key(0), 3)
  stream = [{'x': jax.random.normal(key, (4, 64))} for key in keys]
  tracker = tracking.Tracker({}, 0.99)
  shadows = tracker.init(stream[0])
  adam = optax.scale_by_adam(tracking.B1, 0.99, tracking.EPS)
  state = adam.init(stream[0])
  for count, gradients in enumerate(stream, 1):
    shadows = tracker.advance(shadows, gradients, count)
    updates, state = adam.update(gradients, state)
    np.testing.assert_allclose(
      shadows.last[tracker.EXACT]['x'], updates['x'], rtol=1e-5
    )
  (nu,) = shadows.moments['nu']
  np.testing.assert_allclose(
    nu['x'], optax.tree.get(state, 'nu')['x'], rtol=1e-6
  )


def test_updates_follow_gradients_that_are_made_up():
  """Claim: within 5 %, after 1000 steps with b2 = 0.999; to nearest, far more.

  Most magnitudes of a block are within an octave of their mean.
  """
  scales = jnp.exp(jax.random.normal(jax.random.key(1), (32, 256)) / 2)
  nearest = {'mu': formats.BlockInt(8), 'nu': formats.BlockInt(8, False)}
  pairs = {'ours': tracking.PAIRS['adamw_8bit'], 'nearest': nearest}
  tracker = tracking.Tracker(pairs, 0.999)

  def step(shadows, count):
    key = jax.random.fold_in(jax.random.key(0), count)
    gradients = scales * (0.2 + jax.random.normal(key, scales.shape))
    return tracker.advance(shadows, {'x': gradients}, count), None

  run = jax.jit(lambda start: jax.lax.scan(step, start, jnp.arange(1, 1001))[0])
  last = run(tracker.init({'x': scales})).last
  exact = last[tracker.EXACT]['x']

  def error(name):
    return jnp.linalg.norm(last[name]['x'] - exact) / jnp.linalg.norm(exact)

  assert 3 * error('ours') <= 0.15 < error('nearest')


def test_errors_by_hand():
  """Exact: of (3, 4) instead of (6, 8), and of a zero among four."""
  x, exact = jnp.array([3.0, 4.0]), jnp.array([6.0, 8.0])
  numbers = [tracking.relative_error, tracking.gain, tracking.cosine]
  assert [float(f(x, exact)) for f in numbers] == [0.5, 0.5, 1]
  nu = jnp.array([2.0, 2.0, 0.0, 5.0, 0.0])
  told = tracking.second_moment_errors(nu, jnp.array([1.0, 4, 1, 5, 0]))
  told = {name: float(x) for name, x in told.items()}
  assert told == {'nu': 0.75, 'nu bias': 0, 'nu zeroed': 0.25}


@pytest.mark.parametrize('name', published.OURS)
def test_ours_are_the_recipes(name):
  """Exact: the same codes, scales and noise after two steps."""
  recipe = getattr(optax_mp, name)(1e-3)
  formats_ = optax_mp.compressed(optax.adamw(1e-3), published.OURS[name])
  params = jax.random.normal(jax.random.key(0), (16, 256), jnp.bfloat16)
  moments = []
  for tx in (recipe, formats_):
    state = tx.init(params)
    for step in range(2):
      key = jax.random.key(1 + step)
      gradients = jax.random.normal(key, params.shape, params.dtype)
      _, state = jax.jit(tx.update)(gradients, state, params)
    moments.append([optax.tree.get(state, field) for field in ('mu', 'nu')])
  jax.tree.map(np.testing.assert_array_equal, *moments)


@pytest.mark.parametrize('name', published.PUBLISHED)
def test_published_formats_keep_the_shape(name):
  """Of an array that is not cut as theirs is, within the error of 4 bits."""
  x = jax.random.uniform(jax.random.key(0), (32, 24), minval=0.5)
  like = jax.ShapeDtypeStruct(x.shape, x.dtype)
  for format in published.PUBLISHED[name].values():
    seen = format.decode(format.encode(x, jax.random.key(1)), like)
    assert seen.shape == x.shape and seen.dtype == x.dtype
    assert tracking.relative_error(seen, x) < 0.2


@pytest.mark.parametrize(
  'name, expected',
  [
    ('bfloat16, nearest', 4),
    ('bitsandbytes, 8 bits', 2 + 2 * 4 / 256),
    ('FlashOptim, 8 bits', 2 + 2 * 2 / 32),
    ('torchao, 4 bits', 1 + 2 * 4 / 128),
    ('lpmm, 4 bits', 1 + 4 / 128 + 2 * 4 / 4096),
  ],
)
def test_bytes(name, expected):
  """Exact, by hand."""
  found = published.bytes_per_parameter(published.PUBLISHED[name])
  assert found == expected


def test_flashoptim_by_hand():
  """Exact: 32 values, the largest a power of two."""
  x = jnp.zeros(32).at[:3].set(jnp.array([4.0, -1.0, 1e-9]))
  stored = published.FlashOptim(True).encode(x)
  # 2/4 / (1 + 1/4) = 0.4, of 127.
  assert stored.codes[0, :4].tolist() == [127, -51, 0, 0]
  assert stored.scales.dtype == jnp.float16 and stored.scales[0, 0] == 4
  stored = published.FlashOptim(False).encode(jnp.abs(x))
  # The roots are 2 and 1: 127.5 is rounded up.
  assert stored.codes[0, :4].tolist() == [255, 128, 0, 0]
  seen = published.FlashOptim(False).decode(stored, x)
  np.testing.assert_allclose(seen[:2], [4, (256 / 255) ** 2], rtol=1e-6)


def test_small_gradients_vanish_as_they_do_there():
  """A float16 scale and a least one: what ours do without."""
  x = jnp.full(256, 1e-9)
  like = jax.ShapeDtypeStruct(x.shape, x.dtype)

  def error(pair, field):
    format = pair[field]
    key = jax.random.key(0)
    return tracking.relative_error(
      format.decode(format.encode(x, key), like), x
    )

  assert error(published.PUBLISHED['FlashOptim, 8 bits'], 'mu') == 1
  assert error(published.OURS['flash_adamw'], 'mu') < 1e-6
  x = x**2
  assert error(published.PUBLISHED['torchao, fp8'], 'nu') == 1
  assert error(published.OURS['coat_adamw'], 'nu') < 0.01


def test_main(tmp_path, monkeypatch, capsys):
  configs = []

  def track(config, pairs, advanced):
    configs.append(config)
    assert pairs == PAIRS
    for _ in range(config.steps):
      advanced()
    return _run()

  monkeypatch.setattr(tracking, 'track', track)
  monkeypatch.setattr(tracking, 'PAIRS', PAIRS)
  monkeypatch.setattr(tracking, 'VARIANTS', {})
  flags = ['tracking.py', '--steps', '5', '--out', str(tmp_path)]
  monkeypatch.setattr('sys.argv', flags)
  tracking.main()
  assert [(x.b2, x.steps) for x in configs] == [(0.999, 5), (0.95, 2)]
  result = results.load('tracking', tmp_path)
  assert result['runs'] == {'0.999': _run(), '0.95': _run()}
  assert result['bytes'][EXACT] == 8
  assert (tmp_path / 'tracking.png').read_bytes().startswith(b'\x89PNG')
  assert 'adamw_8bit' in capsys.readouterr().out


def test_one_step_is_refused(monkeypatch, capsys):
  monkeypatch.setattr('sys.argv', ['tracking.py', '--steps', '1'])
  with pytest.raises(SystemExit):
    tracking.main()
  assert 'second run takes half' in capsys.readouterr().err


def test_every_pair_was_measured():
  """In full length."""
  stored = results.load('tracking')
  assert set(stored['bytes']) == set(tracking.PAIRS)
  assert list(map(float, stored['runs'])) == list(tracking.DECAYS)
  names = {*tracking.PAIRS, *tracking.VARIANTS}
  for run in stored['runs'].values():
    assert set(run['pairs']) == names
    assert all(set(x) == set(tracking.TENSORS) for x in run['pairs'].values())
  assert stored['runs']['0.999']['steps'] == tracking.CONFIG.steps


def test_eight_bits_follow():
  """Claim: the update is at most 3.5 % off, for each of the tensors."""
  rows = results.load('tracking')['runs']['0.999']['pairs']['adamw_8bit']
  assert max(row['update'] for row in rows.values()) <= 0.035
