# SPDX-License-Identifier: Apache-2.0
"""Flax NNX trains with ours as it does with Optax in float32."""

import pytest

from clients import nnx_lm
from clients import runs

SPREAD = 0.033  # of float32 over six seeds, as `table.py` prints it


@pytest.mark.parametrize('name', runs.TESTED)
def test_trains_as_float32(name):
  runs.check(nnx_lm.train, name, SPREAD)


@pytest.mark.parametrize('name', ['adamw_8bit', 'lion_8bit', 'came, bfloat16'])
def test_lora_trains_as_float32(name):
  """`wrt=nnx.LoRAParam`: the other parameters are in float32, and stay."""
  runs.check(nnx_lm.train_lora, name, SPREAD)


def test_a_broken_optimizer_is_noticed():
  runs.check_notices(nnx_lm.train, SPREAD)
