# SPDX-License-Identifier: Apache-2.0
"""Formats promote no dtype and no rank by accident."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict():
  with (
    jax.numpy_dtype_promotion('strict'),
    jax.numpy_rank_promotion('raise'),
  ):
    yield
