# SPDX-License-Identifier: Apache-2.0
"""The code of each page runs, as pasted into one file."""

import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).parents[1] / 'docs'
PAGES = sorted(DOCS.glob('*.md'))


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_code_runs(page):
  text = page.read_text()
  names = {}
  for code in re.findall(r'```python\n(.*?)```', text, re.S):
    exec(compile(code, page.name, 'exec'), names)


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
  for link in re.findall(r'\]\((?!http)([^)#]+)\)', page.read_text()):
    assert (page.parent / link).exists(), link
