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
del BUDGETS['in backward']  # which `backward/test_memory.py` reads
TARGETS = ['tpu-v5e', 'h100']
SHAPES = {
  'large': [(8192, 8192)],
  'stacked': [(24, 1024, 4096)],
  'ragged': [(50257, 768)],
  # Its compilation takes as many seconds as it has leaves; 200 others are in
  # `benchmarks/results/update.json`, with limits of their own in its test.
  'small': [(128, 256)] * 20,
  # What XLA:GPU keeps in float32 between two kernels, because it is so large.
  'huge': [(26, 4096, 16384)],
}
RECIPES = [n for n in contenders.CONTENDERS if not n.startswith('optax.')]
# Rounding of a figure in the file, and what a kernel needs whatever the size.
SLACK = 0.01


def measure(name, target, shapes):
  """Temporaries and bytes moved per parameter, state and params donated."""
  contender = contenders.CONTENDERS[name]
  tx = contender.make(1e-3)

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params = [jax.ShapeDtypeStruct(shape, contender.dtype) for shape in shapes]
  args = params, jax.eval_shape(tx.init, params), params
  report = memory.report(
    compile_for(target, step, *args, donate_argnums=(0, 1))
  )
  size = sum(leaf.size for leaf in params)
  donated = memory.plan(tx, params, gradients=None).total_bytes
  # Tiles are padded on a TPU, so it may count a little more.
  assert report.alias_bytes >= donated, 'everything donated is reused'
  return {
    'temporaries': report.temporary_bytes / size,
    'moved': report.bytes_moved / size,
  }


def test_every_recipe_has_a_budget():
  assert set(BUDGETS) == set(RECIPES)
  for budget in BUDGETS.values():
    assert 'large' in budget
    for shapes, row in budget.items():  # a huge leaf is none for a v5e
      assert set(row) == ({'h100'} if shapes == 'huge' else set(TARGETS))


CASES = [
  (name, shapes, target)
  for name in BUDGETS
  for shapes in BUDGETS[name]
  for target in BUDGETS[name][shapes]
]


@pytest.mark.parametrize(('name', 'shapes', 'target'), CASES)
def test_the_step_keeps_to_its_budget(name, shapes, target):
  """Claim: of `budgets.toml`."""
  for figure, measured in measure(name, target, SHAPES[shapes]).items():
    budget = BUDGETS[name][shapes][target][figure]
    assert measured <= budget + SLACK, figure
    assert measured >= 0.95 * budget - SLACK, f'{figure}: lower the budget'


@pytest.mark.parametrize('shapes', [s for s in SHAPES if s != 'huge'])
def test_what_adamw_8bit_promises(shapes):
  """Claim: a ragged leaf may take more on a TPU, where it has a scale a row."""
  budget = BUDGETS['adamw_8bit'][shapes]
  temporaries = 4.5 if shapes == 'ragged' else 2.1
  assert budget['tpu-v5e']['temporaries'] <= temporaries
  assert budget['tpu-v5e']['moved'] <= 48
  assert budget['h100']['temporaries'] <= 0.1


if __name__ == '__main__':
  # The figures to write into the file.
  for name in RECIPES:
    for shapes in BUDGETS.get(name, ['large']):
      for target in BUDGETS.get(name, {}).get(shapes, TARGETS):
        figures = measure(name, target, SHAPES[shapes])
        rounded = {k: round(v, 2) for k, v in figures.items()}
        print(name, shapes, target, rounded, flush=True)
