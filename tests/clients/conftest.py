# SPDX-License-Identifier: Apache-2.0
"""Clients' own loops say `jit` themselves: here it compiles in a hurry."""

import functools
from importlib import util

import jax
import pytest

import quick

# Its import fails where the extra `clients` is not installed.
collect_ignore = [] if util.find_spec('tunix') else ['tunix_peft.py']


class Jitted:
  """As `quick.jit`, but for programs that turn out to be part of another."""

  def __init__(self, fn, **options):
    self._alone = quick.jit(fn, **options)
    self._inside = REAL(fn, **options)
    functools.update_wrapper(self, fn)

  def __call__(self, *args, **kwargs):
    try:
      return self._alone(*args, **kwargs)
    except ValueError as error:
      if 'top-level' not in str(error):
        raise
    return self._inside(*args, **kwargs)

  def __getattr__(self, name):
    return getattr(self._alone, name)


REAL = jax.jit


@pytest.fixture(autouse=True, scope='module')
def hurry():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'jit', Jitted)
    yield
