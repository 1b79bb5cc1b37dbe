# SPDX-License-Identifier: Apache-2.0
"""The small examples train, each in the loop of its library."""

import runpy

import pytest

import backward_linen


def test_digits(capsys):
  """Claim: over 95 % of the test images."""
  runpy.run_module('digits_linen', run_name='__main__')
  printed = capsys.readouterr().out
  assert float(printed.split()[-1]) > 0.95


@pytest.mark.parametrize('half', ['bfloat16', 'float16'])
def test_a_linen_stack_in_the_backward_pass(half, capsys):
  """Claim: over 85 % after a few epochs; the first scales are too large."""
  assert backward_linen.main(['--half', half, '--epochs', '6']) > 0.85
  skipped = int(capsys.readouterr().out.split()[-2])
  assert (skipped > 0) == (half == 'float16')
