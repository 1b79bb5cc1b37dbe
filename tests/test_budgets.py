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
# A budget of `gpus` is that of each of these. Their compilers decide by the
# arithmetic that a device has for a byte of its bandwidth: of an A100 little.
GPUS = ['t4', 'l4', 'a100-40gb', 'h100', 'h200', 'b200']
TWO_GPUS = ['a100-40gb', 'h100']
SHAPES = {
  'large': [(8192, 8192)],
  'stacked': [(24, 1024, 4096)],
  'ragged': [(50257, 768)],
  # Its compilation takes as many seconds as it has leaves; 200 others are in
  # `benchmarks/results/update.json`, with limits of their own in its test.
  'small': [(128, 256)] * 20,
  'huge': [(26, 4096, 16384)],
  'mixed': [(50257, 768), (1024, 4096), (768,), (24, 1024, 1024)],
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


def targets_of(key):
  """The targets that one line of the file is for."""
  return {'gpus': GPUS, 'two-gpus': TWO_GPUS}.get(key, [key])


def test_every_recipe_has_a_budget():
  assert set(BUDGETS) == set(RECIPES)
  for budget in BUDGETS.values():
    assert 'large' in budget
    for shapes, row in budget.items():
      targets = {target for key in row for target in targets_of(key)}
      assert 'h100' in targets
      # A huge leaf is none for a v5e.
      assert shapes in ('huge', 'mixed') or 'tpu-v5e' in targets


CASES = [
  pytest.param(name, shapes, target, row[key], id=f'{name}-{shapes}-{target}')
  for name in BUDGETS
  for shapes, row in BUDGETS[name].items()
  for key in row
  for target in targets_of(key)
]


@pytest.mark.parametrize(('name', 'shapes', 'target', 'budget'), CASES)
def test_the_step_keeps_to_its_budget(name, shapes, target, budget):
  """Claim: of `budgets.toml`."""
  for figure, measured in measure(name, target, SHAPES[shapes]).items():
    limit = budget[figure]
    assert measured <= limit + SLACK, figure
    assert measured >= 0.95 * limit - SLACK, f'{figure}: lower the budget'


@pytest.mark.parametrize('name', ['adamw_8bit', 'adamw_4bit', 'coat_adamw'])
def test_two_passes_on_every_gpu(name):
  """Claim: scales first, then codes, and no moment in float32 in between."""
  temporaries, moved = {
    'adamw_8bit': (0.15, 16.75),
    'adamw_4bit': (0.15, 13.75),
    'coat_adamw': (0.2, 17.0),
  }[name]
  for row in BUDGETS[name].values():
    for key in row.keys() - {'tpu-v5e'}:
      assert row[key]['temporaries'] <= temporaries
      assert row[key]['moved'] <= moved


@pytest.mark.parametrize('shapes', ['large', 'stacked', 'ragged', 'small'])
def test_what_adamw_8bit_promises(shapes):
  """Claim: a ragged leaf may take more on a TPU, where it has a scale a row."""
  budget = BUDGETS['adamw_8bit'][shapes]['tpu-v5e']
  assert budget['temporaries'] <= (4.5 if shapes == 'ragged' else 2.2)
  assert budget['moved'] <= 48


if __name__ == '__main__':
  # The figures to write into the file.
  for name in RECIPES:
    for shapes in BUDGETS.get(name, ['large']):
      for key in BUDGETS.get(name, {}).get(shapes, TARGETS):
        for target in targets_of(key):
          figures = measure(name, target, SHAPES[shapes])
          rounded = {k: round(v, 2) for k, v in figures.items()}
          print(name, shapes, target, rounded, flush=True)
