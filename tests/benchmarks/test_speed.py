# SPDX-License-Identifier: Apache-2.0
"""The speed benchmark at a size of seconds: its statistic and its JSON."""

import dataclasses
import functools

import pytest
from rich import progress

from contenders import CONTENDERS
from contenders import FAMILIES
import quality
import results
import speed

SIZES = {'layers': 1, 'width': 64, 'heads': 2, 'context': 16, 'batch': 2}
pytestmark = pytest.mark.usefixtures('quickly')
TINY = dataclasses.replace(speed.SMALL, **SIZES)


# Compiled once for all tests.
_real = quality.build  # before a test puts `_build` in its place


@functools.cache
def _compiled(config, contender):
  return _real(config, contender, FAMILIES[contender.family])


def _build(config, contender, family):
  del family
  return _compiled(config, contender)


NAMES = ['optax.adamw, float32', 'adamw_bf16']


def test_ratios_are_of_the_same_round():
  """Exact: ratios 1/2, 1/4, 1, 2, 3/4 and, sorted, their quantiles."""
  told = speed.compare([5.0, 5.0, 8.0, 20.0, 6.0], [10.0, 20.0, 8.0, 10.0, 8.0])
  assert told.tokens_per_second == 6
  assert told.ratio == 0.75
  # Of five, the quantile 0.1 lies 0.4 of the way from the least to the next.
  assert told.ratio_p10 == 0.25 + 0.4 * 0.25
  assert told.ratio_p90 == 1 + 0.6 * 1


def test_every_round_has_a_turn_of_each(monkeypatch):
  """Exact: in rotating order."""
  turns = []

  def turn(runner, tokens, steps):
    turns.append(runner)
    return float(len(turns))

  monkeypatch.setattr(speed, 'turn', turn)
  runners = {name: name for name in 'abc'}
  with progress.Progress(disable=True) as bar:
    speeds = speed.measure(runners, None, 4, 1, bar)
  assert ''.join(turns) == 'abcbcacababc'
  assert speeds['a'] == [1, 6, 8, 10]


def test_main_writes_every_field(tmp_path, monkeypatch, capsys):
  sizes = [text for k, v in SIZES.items() for text in (f'--{k}', str(v))]
  monkeypatch.setattr(quality, 'build', _build)
  flags = ['--rounds', '2', '--steps', '2', '--only', 'adamw_bf16']
  monkeypatch.setattr(
    'sys.argv', ['speed.py', *sizes, *flags, '--out', str(tmp_path)]
  )
  speed.main()
  result = results.load('speed', tmp_path)
  assert {'conditions', 'num_params'} < result.keys()
  assert SIZES.items() <= result['config'].items()
  assert (result['rounds'], result['steps']) == (2, 2)
  rows = result['contenders']
  assert list(rows) == NAMES
  reference = rows[result['reference']]
  for row in rows.values():
    told = speed.compare(row['rounds'], reference['rounds'])
    assert {name: row[name] for name in told._fields} == told._asdict()
    assert len(row['rounds']) == 2
    assert row['device_peak_bytes'] is None  # CPUs do not count
  assert reference['ratio'] == reference['ratio_p10'] == 1
  # A program needs at least its arguments.
  assert reference['compiled_peak_bytes'] > 12 * result['num_params']
  assert (tmp_path / 'speed.png').stat().st_size > 5_000
  assert 'tokens/s' in capsys.readouterr().out


def test_device_peak_is_read_after_steps(monkeypatch):
  """Exact, of a device that counts how often it is asked."""
  asked = iter([100, 200])
  steps = []

  def counted(config, contender, family):
    built = _build(config, contender, family)

    def step(state, tokens):
      steps.append(tokens.shape)
      return built.step(state, tokens)

    return built._replace(step=step)

  monkeypatch.setattr(quality, 'build', counted)
  monkeypatch.setattr(speed, '_peak_bytes', lambda: next(asked))
  assert speed.device_peak(TINY, 'adamw_bf16') == 200
  assert steps == [(2, 17), (2, 17)]


def test_peaks_are_drawn(tmp_path):
  """Where the device counts; a contender each has one line."""
  row = {'ratio': 1, 'ratio_p10': 0.9, 'ratio_p90': 1.2}
  row |= {'compiled_peak_bytes': 10**6, 'device_peak_bytes': 10**6}
  drawn = speed.draw({'contenders': dict.fromkeys(CONTENDERS, row)})
  axes = drawn.axes[1]
  assert len(axes.patches) == len(axes.lines[0].get_ydata()) == len(CONTENDERS)
