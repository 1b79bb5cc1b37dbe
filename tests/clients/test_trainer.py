# SPDX-License-Identifier: Apache-2.0
"""google-tunix's `PeftTrainer`: an installed trainer takes ours as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clients import runs

pytest.importorskip('tunix')  # of the extra `clients`

from clients import tunix_peft  # noqa: E402, as it imports tunix

# It leans on parts of JAX that will go.
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')
SPREAD = 0.035  # of float32 over six seeds, as `table.py` prints it


@pytest.mark.parametrize('name', runs.TESTED)
def test_trains_as_float32(name):
  """LoRA: what the trainer was written for."""
  runs.check(tunix_peft.train, name, SPREAD)


def test_a_broken_optimizer_is_noticed():
  runs.check_notices(tunix_peft.train, SPREAD)


@pytest.mark.parametrize('name', ['adamw_8bit', 'adamw_4bit_factored'])
@pytest.mark.parametrize('settings', [{'rank': 0}, {'micro_steps': 2}], ids=str)
def test_all_parameters_and_micro_steps(name, settings):
  """Without LoRA, and with the `MultiSteps` that the trainer adds."""

  def train(make, dtype):
    return tunix_peft.train(make, dtype, **settings)

  runs.check(train, name, SPREAD)


def test_resumes_where_it_was(tmp_path):
  """kind: exact. Through the trainer's own checkpoints."""
  make = runs.OURS['adamw_8bit'].ours
  whole, wanted = tunix_peft.train(make, jnp.bfloat16)
  first, _ = tunix_peft.train(make, jnp.bfloat16, folder=tmp_path, steps=20)
  later, got = tunix_peft.train(make, jnp.bfloat16, folder=tmp_path)
  np.testing.assert_array_equal(np.array([*first, *later]), np.array(whole))
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
