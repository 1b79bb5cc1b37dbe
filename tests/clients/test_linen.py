# SPDX-License-Identifier: Apache-2.0
"""Linen trains with ours as it does with Optax in float32."""

import pytest

from clients import linen_lm
from clients import runs

SPREAD = 0.033  # of float32 over six seeds, as `table.py` prints it


@pytest.mark.parametrize('name', runs.TESTED)
def test_trains_as_float32(name):
  runs.check(linen_lm.train, name, SPREAD)


def test_a_broken_optimizer_is_noticed():
  runs.check_notices(linen_lm.train, SPREAD)
