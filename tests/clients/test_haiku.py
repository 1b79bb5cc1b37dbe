# SPDX-License-Identifier: Apache-2.0
"""Haiku trains with ours as it does with Optax in float32."""

import pytest

from clients import haiku_cnn
from clients import runs

SPREAD = 0.051  # of float32 over six seeds, as `table.py` prints it


@pytest.mark.parametrize('name', runs.TESTED)
def test_trains_as_float32(name):
  runs.check(haiku_cnn.train, name, SPREAD)


def test_a_broken_optimizer_is_noticed():
  runs.check_notices(haiku_cnn.train, SPREAD)
