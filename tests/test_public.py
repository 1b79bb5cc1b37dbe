# SPDX-License-Identifier: Apache-2.0
"""Every public name is documented, with its arguments and an example."""

import inspect

import pytest

import optax_mp
from optax_mp import formats

FUNCTIONS = {
  f'{module.__name__}.{name}': getattr(module, name)
  for module, names in {
    optax_mp: [n for n in optax_mp.__all__ if n[0].islower()],
    formats: [n for n in formats.__all__ if n[0].islower()],
    optax_mp.memory: [n for n in optax_mp.memory.__all__ if n[0].islower()],
    optax_mp.checkpoint: ['to_float32', 'from_float32'],
    optax_mp.backward: ['fused_step'],
    optax_mp.optimizers: [
      n for n in optax_mp.optimizers.__all__ if n[0].islower()
    ],
  }.items()
  for name in names
  if not inspect.ismodule(getattr(module, name))
}
FORMATS = {
  name: getattr(formats, name)
  for name in formats.__all__
  if hasattr(getattr(formats, name), '__dataclass_fields__')
}
DOCUMENTED = {**FUNCTIONS, **FORMATS}


@pytest.mark.parametrize('name', DOCUMENTED)
def test_docstring_has_arguments_and_an_example(name):
  doc = inspect.getdoc(DOCUMENTED[name]) or ''
  takes = inspect.signature(DOCUMENTED[name]).parameters
  assert 'Args:' in doc or not takes
  assert 'Examples:' in doc and '>>> ' in doc


@pytest.mark.parametrize('name', FUNCTIONS)
def test_every_parameter_is_described(name):
  doc = inspect.getdoc(FUNCTIONS[name]) or ''
  code = inspect.unwrap(FUNCTIONS[name]).__code__
  count = code.co_argcount + code.co_kwonlyargcount
  for parameter in code.co_varnames[:count]:
    assert f'{parameter}:' in doc, parameter
  assert 'Returns:' in doc


@pytest.mark.parametrize('name', FORMATS)
def test_every_format_says_what_it_stores(name):
  doc = inspect.getdoc(FORMATS[name]) or ''
  assert '**Stored:**' in doc and 'byte' in doc
  for field in FORMATS[name].__dataclass_fields__:
    assert f'{field}:' in doc, field


def test_all_is_sorted_and_complete():
  for module in (
    optax_mp,
    formats,
    optax_mp.memory,
    optax_mp.backward,
    optax_mp.optimizers,
  ):
    assert list(module.__all__) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
