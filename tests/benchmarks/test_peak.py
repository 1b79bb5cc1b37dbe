# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/peak.py`: the committed peaks are those of the compilers."""

import pytest

from optax_mp import memory
import peak
import results

needs_h100 = pytest.mark.skipif(
  'h100' not in memory.targets(), reason="pip install 'optax_mp[gpu]'"
)


@needs_h100
def test_main(tmp_path):
  """Exact: the same versions make the same program."""
  flags = ['--model', 'demo', '--target', 'h100', '--only', 'adamw_bf16']
  peak.main([*flags, '--out', str(tmp_path)])
  assert (tmp_path / 'peak.png').read_bytes().startswith(b'\x89PNG')
  told, stored = results.load('peak', tmp_path), results.load('peak')
  row = told['steps']['demo']['h100']['adamw_bf16']
  assert row['params'] == 834_304
  versions = [t['conditions']['versions'] for t in (told, stored)]
  if versions[0] == versions[1]:
    assert row == stored['steps']['demo']['h100']['adamw_bf16']


def test_every_contender_is_there():
  """Every model, target and contender; what is donated is reused."""
  stored = results.load('peak')
  assert set(stored['steps']) == set(peak.MODELS)
  always = [name for name in peak.COMPILED if name != peak.RECOMPUTED]
  for model, targets in stored['steps'].items():
    assert set(targets) == set(peak.TARGETS)
    for rows in targets.values():
      assert list(rows) == (peak.COMPILED if model == 'demo' else always)
      for row in rows.values():
        assert row['alias_bytes'] > 0.95 * row['argument_bytes'] - 1e6


@pytest.mark.parametrize(
  'model, share', [('124M', 0.86), ('1B', 0.78), ('7B', 0.78), ('demo', 0.92)]
)
def test_ours_peaks_lower(model, share):
  """Claim: whole steps, against AdamW in float32, on every target."""
  for rows in results.load('peak')['steps'][model].values():
    full, ours = (
      rows[name]['peak_bytes'] - rows[name]['generated_code_bytes']
      for name in ('optax.adamw, float32', 'adamw_bf16')
    )
    assert ours < share * full
