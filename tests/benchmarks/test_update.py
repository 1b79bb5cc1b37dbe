# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the step alone, small: its arithmetic and its reports."""

import functools

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from optax_mp import memory
import peers
import results
import update

PEER = 'a peer'
needs_h100 = pytest.mark.skipif(
  'h100' not in memory.targets(),
  reason="no compiler: pip install 'optax_mp[gpu]'",
)


@pytest.fixture
def small(monkeypatch):
  """One small leaf instead of millions of parameters."""
  monkeypatch.setattr(update, 'SHAPES', {'one leaf': [(8, 512)]})
  monkeypatch.setattr(update, 'LARGE', {'large leaf': [(16, 512)]})
  monkeypatch.setattr(peers, 'PEERS', {})


@pytest.fixture
def run(small, tmp_path):
  """Runs `main` with flags, returns what it wrote."""

  def call(*flags):
    update.main(['--pairs', '2', '--out', str(tmp_path), *flags])
    assert (tmp_path / 'update.png').stat().st_size
    return results.load('update', tmp_path)

  return call


def _add_peer(monkeypatch, load, package='optax'):
  monkeypatch.setitem(peers.PEERS, PEER, peers.Peer(package, load))


def test_ratios_are_of_pairs():
  """By hand: of 2, 1 and 1/2 the middle, and 10 % of the way from each end.

  The last pair was slow as a whole and counts like the others.
  """
  assert update.ratios([1, 2, 8], [2, 2, 4]) == pytest.approx(
    {'ratio': 1, 'low': 0.6, 'high': 1.8}
  )


@pytest.mark.parametrize('times', [([1.0], [1.0]), ([1.0, 1.0], [1.0])])
def test_ratios_need_pairs(times):
  with pytest.raises(ValueError, match='two or more pairs'):
    update.ratios(*times)


@needs_h100
def test_what_float32_costs():
  """Exact: no temporaries; g, p, m, v are read and p, m, v written."""
  shapes = [(4096, 4096)]
  found = update.compiled(update.contender(update.REFERENCE), 'h100', shapes)
  size = peers.num_params(shapes)
  moved, temporary = found['moved'], found['temporary']
  assert moved is not None and temporary is not None
  assert temporary * size < 1024  # the bias corrections
  assert 0 <= (moved - (4 * 4 + 3 * 4)) * size < 1024
  assert found['accessed'] is None


def test_a_step_applies_its_updates():
  """Exact: parameters move, dtypes stay."""
  for name in (update.REFERENCE, 'adamw_bf16'):
    built = update.contender(name)
    params = [jnp.full((8, 512), 0.02, built.dtype)]
    state = built.init(params)
    new, new_state = built.step(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
      (params, state), (new, new_state)
    )
    assert (new[0] != params[0]).all()


def test_a_run_measures_what_it_says(run, capsys):
  """Two contenders, one of them the reference; without compilers."""
  names = [update.REFERENCE, 'adamw_bf16']
  flags = [flag for name in names for flag in ('--only', name)]
  result = run(*flags, '--targets')
  assert list(result['rows']) == names
  assert result['pairs'] == 2
  assert result['num_params'] == {'one leaf': 4096}
  for name, size in zip(names, (16, 12), strict=True):
    part = result['rows'][name]['measured']['one leaf']
    assert 0 < part['low'] <= part['ratio'] <= part['high']
    assert part['nanoseconds'] > 0 and part['reference_nanoseconds'] > 0
    # Beside the arrays, a step counter and random keys.
    assert 0 <= part['bytes'] - size < 0.01
  assert result['conditions']['versions']['jax']
  printed = capsys.readouterr().out
  assert all(name in printed for name in names)


@needs_h100
def test_a_run_compiles(run):
  result = run('--only', update.REFERENCE, '--targets', 'h100')
  compiled = result['rows'][update.REFERENCE]['compiled']['h100']
  assert set(compiled) == {'one leaf', 'large leaf'}
  assert round(compiled['large leaf']['argument'], 2) == 16


def test_a_target_without_compiler_is_told(run, monkeypatch):
  monkeypatch.setattr(memory, 'targets', lambda: ('cpu',))
  result = run('--only', update.REFERENCE, '--targets', 'h100')
  assert result['targets'] == []
  assert result['targets_not_installed'] == ['h100']


def test_an_absent_peer_is_told(run, monkeypatch, capsys):
  def never():
    raise AssertionError('loaded')

  _add_peer(monkeypatch, never, package='optax-mp-is-not-a-peer')
  result = run('--only', PEER, '--targets')
  assert result['rows'][PEER]['error'] == 'not installed'
  assert result['rows'][PEER]['version'] is None
  assert f'{PEER}: not installed' in capsys.readouterr().out


def test_a_peer_that_does_not_load_is_told(run, monkeypatch):
  def load():
    raise ImportError('no such device\nmore lines')

  _add_peer(monkeypatch, load)
  row = run('--only', PEER, '--targets')['rows'][PEER]
  assert row['error'] == 'ImportError: no such device'
  assert row['version']


@pytest.mark.parametrize('error', [AssertionError(), AssertionError('\n')])
def test_an_error_may_say_nothing(error):
  assert peers.first_line(error) == 'AssertionError'


def test_a_peer_that_cannot_step_is_told(run, monkeypatch, capsys):
  def step(params, state, grads):
    raise NotImplementedError('needs a GPU')

  load = functools.partial(
    peers.JaxOptimizer, lambda params: (), step, 'float32'
  )
  _add_peer(monkeypatch, load)
  row = run('--only', PEER, '--targets')['rows'][PEER]
  assert row['measured']['one leaf'] == {
    'error': 'NotImplementedError: needs a GPU'
  }
  assert f'{PEER}: measured: NotImplementedError' in capsys.readouterr().out


def test_a_contender_that_fails_is_an_error(run, monkeypatch):
  def fails(*args):
    raise NotImplementedError('a bug')

  monkeypatch.setattr(update, 'measure', fails)
  with pytest.raises(NotImplementedError, match='a bug'):
    run('--only', update.REFERENCE, '--targets')


def test_no_peers(small, monkeypatch):
  _add_peer(monkeypatch, None)
  assert PEER in update.rows()
  assert PEER not in update.rows(with_peers=False)


def test_one_pair_is_refused(run, capsys):
  with pytest.raises(SystemExit):
    update.main(['--pairs', '1'])
  assert 'no spread' in capsys.readouterr().err


class _Tensor:
  """As torch's, as far as bytes are counted."""

  def __init__(self, *parts):
    self.parts = parts
    if parts:
      self.__tensor_flatten__ = lambda: (['parts'], None)


def test_tensors_made_of_tensors_are_counted():
  """Codes and scales, not the float that they stand for."""
  codes, scales, plain = _Tensor(), _Tensor(), _Tensor()
  state = [{'mu': _Tensor(codes, scales), 'more': {0: plain, 'step': 3}}]
  assert list(peers._tensors(state, _Tensor)) == [codes, scales, plain]


def test_bytes_of_four_bits():
  """Exact: 1/2 for each code, though a code says that it is of one byte."""
  built = peers.JaxOptimizer(
    lambda params: [p.astype(jnp.int4) for p in params],
    lambda params, state, grads: (params, state),
    jnp.bfloat16,
  )
  assert built.run([(4, 8)]).num_bytes() == 32 * (2 + 0.5 + 2)


def test_everyone_gets_the_same_numbers():
  first, again = (list(peers._numbers([(4, 8), (3,)])) for _ in range(2))
  for one, other in zip(first, again, strict=True):
    for x, y in zip(one, other, strict=True):
      np.testing.assert_array_equal(x, y)


def test_a_torch_optimizer_takes_steps():
  """Exact: float32 parameters, gradients, two moments, and a step counter."""
  pytest.importorskip('torch')
  run = peers.PEERS['torch, fused, float32'].load().run([(8, 16)])
  update.measure(run, run, pairs=2, size=1)
  assert run.num_bytes() == 4 * 8 * 16 * 4 + 4


@pytest.mark.parametrize(
  ('target', 'temporary', 'moved'),
  [('tpu-v5e', 2.1, 48.0), ('h100', 0.1, 48.0)],
)
def test_two_hundred_leaves_in_eight_bits(target, temporary, moved):
  """Claim, of the run that is stored: as little as for one large leaf."""
  row = results.load('update')['rows']['adamw_8bit']
  found = row['compiled'][target]['200 leaves']
  assert found['temporary'] <= temporary
  assert found['moved'] <= moved
