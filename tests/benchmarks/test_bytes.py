# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/bytes.py`: the committed bytes are those of the code."""

import json

import bytes as benchmark
import contenders
import results


def test_the_committed_figures_are_current():
  """Exact: a change of a recipe's bytes wants a new run."""
  stored = results.load('bytes')
  now = json.loads(json.dumps(benchmark.compute()))
  assert {k: stored[k] for k in now} == now


def test_parts_add_up():
  """Exact, by hand: but for counts and keys."""
  row = benchmark.measure(contenders.CONTENDERS['adamw_bf16, 8'])
  parts = [round(row[part], 3) for part in benchmark.PARTS]
  assert parts == [2, 1, 6, 2]
  assert row['total'] == sum(row[part] for part in benchmark.PARTS)


def test_main(tmp_path, capsys):
  benchmark.main(['--out', str(tmp_path)])
  assert (tmp_path / 'bytes.png').read_bytes().startswith(b'\x89PNG')
  told = results.load('bytes', tmp_path)
  assert set(told['counted']) == set(contenders.CONTENDERS)
  assert told['conditions']['versions']['jax']
  assert 'sgdm_bf16' in capsys.readouterr().out
