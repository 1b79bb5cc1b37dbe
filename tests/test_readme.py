# SPDX-License-Identifier: Apache-2.0
"""The README's code runs and its numbers are those that were measured."""

import importlib.util
import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / 'README.md').read_text()
CODE = re.findall(r'```python\n(.*?)```', TEXT, re.S)


def _script():
  spec = importlib.util.spec_from_file_location(
    'readme', ROOT / 'benchmarks' / 'readme.py'
  )
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_numbers_are_made_by_the_script():
  """Exact: `make readme` would change nothing."""
  assert _script().filled(TEXT) == TEXT


def test_code_runs(capsys):
  """Every block, as pasted into one file."""
  names = {}
  for code in CODE:
    exec(compile(code, 'README.md', 'exec'), names)
  assert 'total' in capsys.readouterr().out
  state = names['tx'].init(names['params'])
  assert any(x.dtype == 'uint8' for x in jax.tree.leaves(state))


def test_the_first_example_is_short_and_early():
  lines = TEXT.splitlines()
  start = lines.index('```python')
  end = lines.index('```', start)
  assert end < 30
  assert end - start - 1 <= 15
  assert len(lines) <= 150


@pytest.mark.parametrize('link', re.findall(r'\]\((?!http)([^)#]+)\)', TEXT))
def test_links_lead_somewhere(link):
  assert (ROOT / link).exists()
