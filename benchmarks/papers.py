# SPDX-License-Identifier: Apache-2.0
"""Papers' optimizers against AdamW, each at a learning rate of its own.

  python benchmarks/papers.py [--seeds 5] [--steps 1000] [--processes 2]
    [--only NAME ...]

Trains the GPT of `examples/train_gpt.py` in float32 with every optimizer of
`contenders.PAPERS`, which says in what they differ from their defaults. The
rate is searched for on a grid of three a decade, from the row's on towards
lower losses until those on both sides of the best are worse, on a seed that
the comparison does not use. Then each trains at its best rate, from the same
weights and on the same batches as AdamW, whose own rate was found in the same
way. What a method is not for has an optimizer of its own at
`contenders.ADAM_RATE`.

A training takes half a minute on a core of a CPU, and there are some 150 of
them. `papers.json` has every loss of every search; it is written after each
row, and the same command goes on from there, on the same machine.
"""

import argparse
from collections.abc import Callable
from concurrent import futures
import dataclasses
import functools
import multiprocessing
import pathlib
import sys
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from matplotlib import figure
import numpy as np
import optax
from rich import progress

from contenders import ADAM_RATE
from contenders import PAPERS
from contenders import Paper
from optax_mp import memory
import quality
import results

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'examples'))

import train_gpt

REFERENCE = 'optax.adamw'
TUNING_SEEDS = (1000,)
RATES_A_DECADE = 3
MOST = 9  # rates that a search may try


def rate_at(paper: Paper, step: int) -> float:
  """The learning rate so many steps of the grid above the row's."""
  return float(f'{paper.learning_rate * 10 ** (step / RATES_A_DECADE):.3g}')


def search(
  loss_at: Callable[[int], float], most: int = MOST
) -> dict[int, float]:
  """Goes down a grid until the best has worse ones on both sides.

  Args:
    loss_at: of a position on the grid; infinite where training diverged.
    most: how many positions may be tried.

  Returns:
    The losses of all that were, by position; 0 is the first.
  """
  found = {0: loss_at(0)}
  while len(found) < most:
    # Of equal losses, or of none, the smallest rate.
    best = min(found, key=lambda step: (found[step], step))
    todo = [step for step in (best - 1, best + 1) if step not in found]
    if not todo:
      break
    found[todo[0]] = loss_at(todo[0])
  return found


def scaled(
  config: train_gpt.Config, paper: Paper
) -> optax.GradientTransformationExtraArgs:
  """The optimizer, its learning rate a number in its state.

  So that one program serves all rates.
  """

  def make(rate):
    def with_schedule(schedule):
      others = {}
      if paper.others:
        others[paper.others] = lambda count: ADAM_RATE * schedule(count)
      return paper.make(lambda count: rate * schedule(count), **others)

    return train_gpt.scheduled(config, with_schedule)

  return optax.inject_hyperparams(make)(rate=1.0)


@functools.cache
def built(name: str, config: train_gpt.Config) -> train_gpt.Setup:
  """Compiles the step of an optimizer, for all rates and seeds."""
  config = dataclasses.replace(config, learning_rate=1.0)
  tx = scaled(config, PAPERS[name])
  return train_gpt.setup(config, tx, jnp.float32, compiled)


def compiled(fn: Any, donated: Any, *args: Any) -> jax.stages.Compiled:
  """Compiles ahead; scalars that are not reused are no error here."""
  return jax.jit(fn, donate_argnums=donated).lower(*args).compile()


def final_loss(
  name: str, config: train_gpt.Config, seed: int, rate: float
) -> float:
  """Trains once; the last validation loss, infinite if it is no number."""
  setup = built(name, config)

  def create():
    state = setup.create(seed)
    rate_array = jnp.asarray(rate, jnp.float32)
    opt_state = optax.tree.set(state.opt_state, rate=rate_array)
    return state._replace(opt_state=opt_state)

  validation = None
  config = dataclasses.replace(config, seed=seed)
  for record in train_gpt.train(config, setup._replace(create=create)):
    if not np.isfinite(record.loss):
      return float('inf')
    validation = record.validation
  assert validation is not None, 'the last step validates'
  return validation


def studied(
  name: str, config: train_gpt.Config, seeds: int, pool: futures.Executor
) -> dict[str, Any]:
  """Searches for the rate, then trains with every seed."""
  paper = PAPERS[name]
  steps = int(config.steps * paper.share_of_steps)
  config = dataclasses.replace(config, steps=steps, validate_every=steps)

  def losses(seeds, rate):
    runs = [pool.submit(final_loss, name, config, i, rate) for i in seeds]
    return [run.result() for run in runs]

  def mean_at(step):
    return float(np.mean(losses(TUNING_SEEDS, rate_at(paper, step))))

  tried = search(mean_at)
  best = min(tried, key=lambda step: tried[step])
  rate = rate_at(paper, best)
  return {
    'search': {str(rate_at(paper, i)): tried[i] for i in sorted(tried)},
    'bracketed': best - 1 in tried and best + 1 in tried,
    'learning_rate': rate,
    'steps': steps,
    'losses': losses(range(seeds), rate),
    'bytes': state_bytes(paper, config),
  }


def state_bytes(paper: Paper, config: train_gpt.Config) -> float:
  """What the state of the model's kernels takes, for each of their values."""
  model = nnx.eval_shape(lambda: train_gpt.GPT(config, nnx.Rngs(0)))
  blocks = nnx.to_pure_dict(nnx.state(model.blocks))
  kernels = {
    name: {'kernel': part['kernel']}
    for name, part in blocks.items()
    if 'kernel' in part
  }
  plan = memory.plan(paper.make(1.0), kernels, gradients=None)
  return plan.bytes_per_param - 4


def told(
  config: train_gpt.Config, rows: dict[str, dict[str, Any]], seeds: int
) -> dict[str, Any]:
  """All that is written down, gaps to AdamW included."""
  ordered = {}
  for name in PAPERS:
    if name not in rows:
      continue
    own = dict(rows[name])
    if REFERENCE in rows:
      reference = rows[REFERENCE]['losses']
      gap = quality.paired_gap(own['losses'], reference)
      own |= {'gap': gap.mean, 'standard_error': gap.standard_error}
    own['mean'] = float(np.mean(own['losses']))
    ordered[name] = own
  return {
    'config': quality.kept(config),
    'seeds': list(range(seeds)),
    'tuning_seeds': list(TUNING_SEEDS),
    'contenders': ordered,
  }


def draw(result: dict[str, Any]) -> figure.Figure:
  """Gaps to AdamW over the bytes of the state."""
  rows = {k: v for k, v in result['contenders'].items() if 'gap' in v}
  drawn = figure.Figure(
    figsize=(7, 1.2 + 0.35 * len(rows)), layout='constrained'
  )
  axes = drawn.subplots()
  axes.axvline(0, color='black', linewidth=0.8)
  axes.errorbar(
    [row['gap'] for row in rows.values()],
    [f'{name}, {row["bytes"]:.2f} B' for name, row in rows.items()],
    xerr=[row['standard_error'] for row in rows.values()],
    fmt='o',
    capsize=4,
  )
  axes.invert_yaxis()
  axes.set(
    xlabel='validation loss minus that of AdamW, each at its best rate\n'
    '(nats per byte; mean and standard error over seeds; bytes of state per '
    'parameter)'
  )
  return drawn


def earlier(
  folder: pathlib.Path, wanted: dict[str, Any], only: bool
) -> dict[str, Any]:
  """Rows of a run that stopped, none of another one.

  The text is Python's own sources, so that another Python trains on another
  text, and AdamW's losses there say nothing of rows here.

  Args:
    folder: where it is.
    wanted: the conditions of this one.
    only: whether it is to have some rows of its own: then a ValueError.

  Returns:
    The result.
  """
  try:
    before = results.load('papers', folder)
  except FileNotFoundError:
    return {'contenders': {}}
  others = [key for key in ('config', 'seeds') if before[key] != wanted[key]]
  now = results.conditions()
  others += [k for k, v in before['conditions'].items() if now.get(k) != v]
  if not others:
    return before
  if only:
    raise ValueError(
      f'`{folder / "papers.json"}` is of another {" and ".join(others)}, and '
      'would be overwritten. Name another folder with `--out`.'
    )
  return {'contenders': {}}


def parse_arguments() -> argparse.Namespace:
  """Reads the flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=quality.CONFIG.steps)
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument('--only', action='append', choices=PAPERS)
  parser.add_argument('--out', type=pathlib.Path, default=results.FOLDER)
  arguments = parser.parse_args()
  if arguments.seeds < 3:
    parser.error('`--seeds` must be 3 or more, for a standard error.')
  return arguments


def main() -> None:
  """Runs the rows that are not there yet, or those asked for."""
  arguments = parse_arguments()
  config = dataclasses.replace(quality.CONFIG, steps=arguments.steps)
  conditions = told(config, {}, arguments.seeds)
  before = earlier(arguments.out, conditions, bool(arguments.only))
  rows = {k: v for k, v in before['contenders'].items() if k in PAPERS}
  todo = [
    n for n in arguments.only or PAPERS if arguments.only or n not in rows
  ]
  # New processes, each with programs of its own; a thread for each search.
  context = multiprocessing.get_context('spawn')
  with (
    futures.ProcessPoolExecutor(arguments.processes, context) as pool,
    futures.ThreadPoolExecutor(max(1, len(todo))) as threads,
    progress.Progress() as bar,
  ):
    task = bar.add_task('optimizers', total=len(todo))
    running = {
      threads.submit(studied, name, config, arguments.seeds, pool): name
      for name in todo
    }
    for done in futures.as_completed(running):
      rows[running[done]] = done.result()
      result = told(config, rows, arguments.seeds)
      results.save('papers', result, draw(result), arguments.out)
      row = result['contenders'][running[done]]
      bar.print(
        f'{running[done]:28} {row["mean"]:.4f} at {row["learning_rate"]:g} of '
        f'{len(row["search"])} rates, {row["bytes"]:.3f} B'
      )
      bar.advance(task)


if __name__ == '__main__':
  try:
    main()
  except ValueError as error:
    sys.exit(f'error: {error}')
