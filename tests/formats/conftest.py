# SPDX-License-Identifier: Apache-2.0
"""Formats promote no dtype and no rank by accident."""

import pytest


@pytest.fixture(autouse=True)
def always(strict):
  return strict
