# SPDX-License-Identifier: Apache-2.0
"""Imports point down, and small files stay small."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'optax_mp'
FILES = sorted(PACKAGE.rglob('*.py'))

# Who may import which part of ours; a part may always import itself.
ALLOWED = {
  '_core': set(),
  '_cast': {'_core', 'formats'},
  '_inject': {'_core'},
  'formats': {'_core'},
  'wrappers': {'_core', 'formats'},
  'optimizers': {'_core', 'formats'},
  '_recipes': {'_core', 'optimizers', 'wrappers', 'formats'},
  'memory': {'_core', 'formats'},
  'checkpoint': {'_core', 'wrappers', 'formats'},
  'backward': {'_core', 'formats'},
  'sharding': {'_core', 'formats'},
}


def _part(path):
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def _imports(path):
  """Every imported module, as absolute dotted names."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'absolute imports only'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.name)
def test_imports_point_down(path):
  ours = {
    name.split('.')[1]
    for name in _imports(path)
    if name.startswith('optax_mp.')
  }
  # A program that people run stands on top of everything.
  if _part(path) != '__init__' and path.name != '__main__.py':
    assert ours <= ALLOWED[_part(path)] | {_part(path)}


OPTIMIZERS = PACKAGE / 'optimizers'
# A paper is a file, or a folder where that would be too long.
PAPERS = [
  path
  for path in sorted(OPTIMIZERS.rglob('_[a-z]*.py'))
  if path.relative_to(OPTIMIZERS).parts[0] != '_core'
]


@pytest.mark.parametrize('path', PAPERS, ids=lambda p: p.name)
def test_no_paper_imports_another(path):
  """Mathematics that two of them share is in `_core`."""
  own = path.relative_to(OPTIMIZERS).parts[0]
  for name in _imports(path):
    if name.startswith('optax_mp.optimizers.'):
      assert name.split('.')[2] in ('_core', own)


@pytest.mark.parametrize('path', sorted((OPTIMIZERS / '_core').glob('*.py')))
def test_the_core_knows_no_paper(path):
  ours = [n for n in _imports(path) if n.startswith('optax_mp.optimizers')]
  assert all(n.startswith('optax_mp.optimizers._core') for n in ours)


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.name)
def test_the_package_needs_jax_optax_and_chex_only(path):
  packages = {name.split('.')[0] for name in _imports(path)}
  foreign = packages & {'flax', 'orbax', 'torch', 'matplotlib', 'rich', 'scipy'}
  if path.name == '_show.py':
    foreign -= {'matplotlib'}  # for `--plot`, imported only then
  assert not foreign
  assert not [name for name in _imports(path) if '._src' in name]


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.name)
def test_files_and_functions_are_short(path):
  text = path.read_text()
  assert len(text.splitlines()) <= 250
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef):
      body = node.body[1:] if ast.get_docstring(node) else node.body
      # A transformation holds its init and update: they count by themselves.
      inner = [n for n in body if isinstance(n, ast.FunctionDef)]
      lines = _lines(body) - sum(_lines([n]) for n in inner)
      assert lines <= 40, node.name


def _lines(nodes):
  return (nodes[-1].end_lineno or 0) - nodes[0].lineno + 1 if nodes else 0


@pytest.mark.parametrize(
  'folder', ['tests', 'examples', 'notebooks', 'benchmarks']
)
def test_only_public_names_outside(folder):
  """But pure functions have tests of their own, beside those of their part."""
  private = {
    (path.parent.name, name)
    for path in (ROOT / folder).rglob('*.py')
    for name in _imports(path)
    if name.startswith('optax_mp') and '._' in name
  }
  assert all(
    folder in ('formats', 'memory') and f'.{folder}._' in name
    for folder, name in private
  )
