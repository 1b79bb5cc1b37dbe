# SPDX-License-Identifier: Apache-2.0
"""What the optimizer step may cost, per parameter: `budgets.toml`.

A step may not need more than its budget. It may not need much less either: then
the budget guards nothing, and a gain deserves to be written down.
"""

import pathlib
import tomllib

import jax
import optax
import pytest

from compilers import compile_for
import contenders
from optax_mp import memory

BUDGETS = tomllib.loads(
  (pathlib.Path(__file__).parent / 'budgets.toml').read_text()
)
TARGETS = ['tpu-v5e', 'h100']
SHAPE = (8192, 8192)
RECIPES = [n for n in contenders.CONTENDERS if not n.startswith('optax.')]
# Rounding of a figure in the file, and what a kernel needs whatever the size.
SLACK = 0.01


def measure(name, target):
  """Temporaries and bytes moved per parameter, state and params donated."""
  contender = contenders.CONTENDERS[name]
  tx = contender.make(1e-3)

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params = {'w': jax.ShapeDtypeStruct(SHAPE, contender.dtype)}
  args = params, jax.eval_shape(tx.init, params), params
  report = memory.report(
    compile_for(target, step, *args, donate_argnums=(0, 1))
  )
  size = SHAPE[0] * SHAPE[1]
  return {
    'temporaries': report.temporary_bytes / size,
    'moved': report.bytes_moved / size,
  }


def test_every_recipe_has_a_budget():
  assert set(BUDGETS) == set(RECIPES)
  assert all(set(budget) == set(TARGETS) for budget in BUDGETS.values())


@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('name', RECIPES)
def test_the_step_keeps_to_its_budget(name, target):
  """Claim: of `budgets.toml`."""
  for figure, measured in measure(name, target).items():
    budget = BUDGETS[name][target][figure]
    assert measured <= budget + SLACK, figure
    assert measured >= 0.95 * budget - SLACK, f'{figure}: lower the budget'


if __name__ == '__main__':
  # The figures to write into the file.
  for name in RECIPES:
    for target in TARGETS:
      figures = measure(name, target)
      print(name, target, {k: round(v, 2) for k, v in figures.items()})
