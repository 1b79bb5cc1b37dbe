# SPDX-License-Identifier: Apache-2.0
"""The README's code runs and its numbers are those that were measured."""

import pathlib
import re

import jax
import pytest

import readme

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / 'README.md').read_text()
CODE = re.findall(r'```python\n(.*?)```', TEXT, re.S)


@pytest.mark.parametrize('page', readme.PAGES, ids=lambda p: p.parent.name)
def test_numbers_are_made_by_the_script(page):
  """Exact: `make readme` would change nothing."""
  assert readme.filled(page) == page.read_text()


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


@pytest.mark.parametrize('page', readme.PAGES, ids=lambda p: p.parent.name)
def test_links_lead_somewhere(page):
  links = re.findall(r'\]\((?!http)([^)#]+)\)', page.read_text())
  assert links
  for link in links:
    assert (page.parent / link).exists(), link
