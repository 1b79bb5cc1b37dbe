# SPDX-License-Identifier: Apache-2.0
"""The quality benchmark at a size of seconds: its statistic and its JSON."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from contenders import FAMILIES
from contenders import STUDIED
import quality
import results

TINY = dataclasses.replace(
  quality.CONFIG,
  layers=1,
  width=64,
  heads=2,
  context=16,
  batch=2,
  steps=4,
  warmup=2,
  validate_every=4,
  validation_batches=2,
)
NAMES = ['optax.adamw, float32', 'adamw_bf16']
pytestmark = pytest.mark.usefixtures('quickly')


_real = quality.build  # before a test puts `_build` in its place


@functools.cache
def _compiled(config, name):
  """Compiled once for all tests."""
  contender = STUDIED[name]
  return _real(config, contender, FAMILIES[contender.family])


def _build(config, contender, family):
  del family
  name = next(n for n, other in STUDIED.items() if other is contender)
  return _compiled(config, name)


def _run(monkeypatch, folder, *flags):
  monkeypatch.setattr(quality, 'CONFIG', TINY)
  monkeypatch.setattr(
    'sys.argv', ['quality.py', '--steps', '4', '--out', str(folder), *flags]
  )
  quality.main()


def test_gap_is_paired():
  """Exact: differences of 1, 2 and 6 have mean 3 and variance 14 / 2."""
  gap = quality.paired_gap([11.0, 52.0, 36.0], [10.0, 50.0, 30.0])
  assert gap == (3.0, math.sqrt(7) / math.sqrt(3))


def test_seeds_that_differ_alike_leave_no_error():
  """Exact: however far the seeds are apart."""
  assert quality.paired_gap([1.5, 100.5], [1.0, 100.0]) == (0.5, 0.0)


@pytest.mark.parametrize('losses, reference', [([1], [1]), ([1, 2], [1])])
def test_gap_needs_pairs(losses, reference):
  with pytest.raises(ValueError, match='two or more seeds, each in'):
    quality.paired_gap(losses, reference)


def test_references_come_first():
  assert quality.with_references(['adamw_bf16']) == NAMES
  assert quality.with_references(['lion_bf16']) == [
    'optax.lion, float32',
    'lion_bf16',
  ]
  assert quality.with_references(list(STUDIED)) == list(STUDIED)


def test_seeds_and_contenders_share_weights():
  """Exact: of one seed float32 and bfloat16, rounded; seeds differ."""
  full, low = (_compiled(TINY, name) for name in NAMES)
  weights = full.create(3).params['bytes']['embedding']
  rounded = low.create(3).params['bytes']['embedding']
  np.testing.assert_array_equal(weights.astype(rounded.dtype), rounded)
  assert np.any(weights != full.create(4).params['bytes']['embedding'])


def test_main_writes_every_field(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(quality, 'build', _build)
  _run(monkeypatch, tmp_path, '--seeds', '2', '--only', 'adamw_bf16')
  result = results.load('quality', tmp_path)
  assert {'conditions', 'config', 'families'} < result.keys()
  assert result['config']['steps'] == 4 and result['seeds'] == [0, 1]
  shapes = _compiled(TINY, 'adamw_bf16').shapes.params
  sizes = [leaf.size for leaf in jax.tree.leaves(shapes)]
  assert result['num_params'] == sum(sizes)

  rows = result['contenders']
  assert list(rows) == NAMES
  reference, ours = rows.values()
  for row in rows.values():
    assert row['reference'] == 'optax.adamw, float32'
    assert row['mean'] == sum(row['losses']) / 2
    gap = quality.paired_gap(row['losses'], reference['losses'])
    assert (row['gap'], row['standard_error']) == gap
  assert reference['gap'] == reference['standard_error'] == 0
  assert len({*reference['losses'], *ours['losses']}) == 4
  assert (tmp_path / 'quality.png').stat().st_size > 5_000
  assert 'adamw_bf16' in capsys.readouterr().out


def test_an_interrupted_run_leaves_what_it_has(tmp_path, monkeypatch):
  def interrupted(config, contender, family):
    if contender is STUDIED['adamw_bf16']:
      raise KeyboardInterrupt
    return _build(config, contender, family)

  monkeypatch.setattr(quality, 'build', interrupted)
  with pytest.raises(KeyboardInterrupt):
    _run(monkeypatch, tmp_path, '--seeds', '2', '--only', 'adamw_bf16')
  assert list(results.load('quality', tmp_path)['contenders']) == NAMES[:1]


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
  """Exact: what is there is kept, and never mixed with other conditions."""
  monkeypatch.setattr(quality, 'build', _build)
  _run(monkeypatch, tmp_path, '--seeds', '2', '--only', 'adamw_bf16')
  first = results.load('quality', tmp_path)
  wanted = {'config': first['config'], 'families': first['families']}
  losses = quality.earlier('quality', tmp_path, wanted)
  assert list(losses) == NAMES
  other = wanted | {'families': {}}
  with pytest.raises(ValueError, match='is of another families, and would be'):
    quality.earlier('quality', tmp_path, other)
  assert quality.earlier('nothing', tmp_path, wanted) == {}


def test_another_decay_has_its_own_result(tmp_path, monkeypatch):
  monkeypatch.setattr(quality, 'build', _build)
  flags = ['--seeds', '2', '--b2', '0.95', '--only', 'adamw_bf16']
  _run(monkeypatch, tmp_path, *flags)
  result = results.load('quality_b2_0.95', tmp_path)
  assert result['families']['adamw']['others']['b2'] == 0.95
  assert list(result['contenders']) == NAMES


def test_one_seed_is_refused(tmp_path, monkeypatch, capsys):
  with pytest.raises(SystemExit):
    _run(monkeypatch, tmp_path, '--seeds', '1')
  assert 'one seed has no standard error' in capsys.readouterr().err


DECAYS = {'quality': 0.99, 'quality_b2_0.999': 0.999, 'quality_b2_0.95': 0.95}


@pytest.mark.parametrize('name', DECAYS)
def test_what_is_stored_was_measured_in_full(name):
  stored = results.load(name)
  assert stored['families']['adamw']['others']['b2'] == DECAYS[name]
  assert stored['config']['steps'] >= 1000 and len(stored['seeds']) >= 5
  for contender in stored['contenders'].values():
    assert len(contender['losses']) == len(stored['seeds'])


@pytest.mark.parametrize('name', DECAYS)
def test_eight_bits_end_where_float32_does(name):
  """Statistical: no gap is larger than two standard errors.

  The benchmark can see one: that of plain bfloat16 is larger than ten.
  """
  contenders = results.load(name)['contenders']
  plain = contenders['optax.adamw, bfloat16']
  assert plain['gap'] > 10 * plain['standard_error']
  ours = [n for n in contenders if n.endswith('_8bit')]
  for name in ['adamw_bf16', 'coat_adamw', 'flash_adamw', *ours]:
    gap = abs(contenders[name]['gap'])
    assert gap <= 2 * contenders[name]['standard_error'], name


@pytest.mark.parametrize('name', DECAYS)
def test_adamw_in_eight_bits_is_within_one_standard_error(name):
  """Statistical: two times in three, if there is no gap at all."""
  ours = results.load(name)['contenders']['adamw_8bit']
  assert abs(ours['gap']) <= ours['standard_error']
