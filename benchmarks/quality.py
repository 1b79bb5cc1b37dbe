# SPDX-License-Identifier: Apache-2.0
"""How far from float32 a training ends: final validation losses of many seeds.

  python benchmarks/quality.py [--seeds 10] [--steps 1000] [--b2 0.999]
    [--only NAME ...]

Trains the GPT of `examples/train_gpt.py` with every contender from the same
float32 weights on the same batches: a seed decides both. Clipping, warmup and
cosine decay are the same for all, learning rates those of their family. Gaps
are paired by seed: a seed is good or bad for all contenders alike, and cancels
in the difference. All matrices have their moments stored small, embedding and
head too. `--b2` is for AdamW alone, and for the formats that others publish: it
has a result of its own, `quality_b2_0.999.json`.

An hour each on a core of a CPU. The result is written after each contender; the
same command goes on where Ctrl-C left it, and with `--only` it measures those
contenders again.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import functools
import math
import pathlib
import sys
from typing import Any, NamedTuple

import jax
from matplotlib import figure
import numpy as np
from rich import progress

from contenders import CONTENDERS
from contenders import Contender
from contenders import FAMILIES
from contenders import Family
from contenders import STUDIED
import results

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'examples'))

import train_gpt

CONFIG = train_gpt.Config(
  layers=2, batch=4, steps=1000, compute_dtype='float32'
)
# Fields of the config that `FAMILIES` and the seeds decide instead.
_NOT_USED = (
  'optimizer',
  'residual_bits',
  'learning_rate',
  'b2',
  'weight_decay',
  'seed',
  'validate_every',
  'checkpoint',
  'save_every',
)


class Gap(NamedTuple):
  """A mean difference and how uncertain it is."""

  mean: float
  standard_error: float


def paired_gap(losses: Sequence[float], reference: Sequence[float]) -> Gap:
  """The mean of `losses - reference`, both of the same seeds in one order.

  Args:
    losses: of a contender, one a seed.
    reference: of its float32 reference.

  Returns:
    The mean and its standard error, that of the differences.
  """
  if len(losses) != len(reference) or len(losses) < 2:
    raise ValueError(
      f'`losses` must be of two or more seeds, each in `reference`; got '
      f'{len(losses)} and {len(reference)}.'
    )
  differences = np.subtract(losses, reference)
  spread = differences.std(ddof=1)
  return Gap(
    float(differences.mean()), float(spread / math.sqrt(len(differences)))
  )


def with_references(names: Sequence[str]) -> list[str]:
  """Adds what each is measured against, in the order of `STUDIED`."""
  wanted = {*names, *(STUDIED[name].reference for name in names)}
  return [name for name in STUDIED if name in wanted]


def families(b2: float | None) -> dict[str, Family]:
  """The families to study: all, or AdamW with another decay."""
  if b2 is None:
    return FAMILIES
  adamw = FAMILIES['adamw']
  return {'adamw': dataclasses.replace(adamw, others=adamw.others | {'b2': b2})}


def build(
  config: train_gpt.Config, contender: Contender, family: Family
) -> train_gpt.Setup:
  """Compiles the training step of a contender."""
  config = dataclasses.replace(config, learning_rate=family.learning_rate)
  tx = train_gpt.scheduled(config, contender.make, **family.others)
  return train_gpt.setup(config, tx, contender.dtype)


def final_loss(
  config: train_gpt.Config, built: train_gpt.Setup, advance
) -> float:
  """Trains once, from the config's seed; the last validation loss."""
  # One compiled step for all seeds: only the first weights differ.
  create = functools.partial(built.create, config.seed)
  validation = None
  for record in train_gpt.train(config, built._replace(create=create)):
    validation = record.validation
    advance()
  assert validation is not None, 'the last step validates'
  return validation


def kept(config: train_gpt.Config) -> dict[str, Any]:
  """What of a config is the same for all contenders and seeds."""
  return {k: v for k, v in vars(config).items() if k not in _NOT_USED}


def told(
  config: train_gpt.Config,
  studied: dict[str, Family],
  num_params: int,
  losses: dict[str, list[float]],
) -> dict[str, Any]:
  """All that is written down, of losses by contender and seed."""
  contenders = {}
  for name in STUDIED:
    if name not in losses:
      continue
    own = losses[name]
    reference = STUDIED[name].reference
    gap = paired_gap(own, losses[reference])
    contenders[name] = {
      'losses': own,
      'mean': float(np.mean(own)),
      'reference': reference,
      'gap': gap.mean,
      'standard_error': gap.standard_error,
    }
  return {
    'config': kept(config),
    'families': {k: dataclasses.asdict(v) for k, v in studied.items()},
    'num_params': num_params,
    'seeds': list(range(max(map(len, losses.values()), default=0))),
    'contenders': contenders,
  }


def earlier(
  name: str, folder: pathlib.Path, wanted: dict[str, Any]
) -> dict[str, list[float]]:
  """Losses of a run that stopped; a ValueError if it was another one."""
  try:
    result = results.load(name, folder)
  except FileNotFoundError:
    return {}
  others = [key for key, value in wanted.items() if result.get(key) != value]
  if others:
    raise ValueError(
      f'`{folder / name}.json` is of another {" and ".join(others)}, and would '
      'be overwritten. Remove it, or name another folder with `--out`.'
    )
  rows = result['contenders']
  return {name: row['losses'] for name, row in rows.items() if name in STUDIED}


def draw(result: dict[str, Any]) -> figure.Figure:
  """Gaps to float32 with their standard errors."""
  gaps = {
    name: row
    for name, row in result['contenders'].items()
    if name != row['reference']
  }
  drawn = figure.Figure(
    figsize=(7, 1.2 + 0.4 * len(gaps)), layout='constrained'
  )
  axes = drawn.subplots()
  axes.axvline(0, color='black', linewidth=0.8)
  axes.errorbar(
    [row['gap'] for row in gaps.values()],
    list(gaps),
    xerr=[row['standard_error'] for row in gaps.values()],
    fmt='o',
    capsize=4,
  )
  axes.invert_yaxis()
  axes.set(
    xlabel='validation loss minus that of the same optimizer in float32\n'
    '(nats per byte; mean and standard error over seeds)'
  )
  return drawn


def parse_arguments() -> argparse.Namespace:
  """Reads the flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--seeds', type=int, default=10)
  parser.add_argument('--steps', type=int, default=CONFIG.steps)
  parser.add_argument('--b2', type=float)
  parser.add_argument('--only', action='append', choices=STUDIED)
  parser.add_argument('--out', type=pathlib.Path, default=results.FOLDER)
  arguments = parser.parse_args()
  if arguments.seeds < 2:
    parser.error('`--seeds` must be 2 or more: one seed has no standard error.')
  return arguments


def main() -> None:
  """Trains every contender with every seed."""
  arguments = parse_arguments()
  studied = families(arguments.b2)
  title = 'quality' if arguments.b2 is None else f'quality_b2_{arguments.b2}'
  known = CONTENDERS if arguments.b2 is None else STUDIED
  possible = [n for n in known if known[n].family in studied]
  names = with_references(arguments.only or possible)
  config = dataclasses.replace(
    CONFIG, steps=arguments.steps, validate_every=arguments.steps
  )
  conditions = told(config, studied, 0, {})
  wanted = {key: conditions[key] for key in ('config', 'families')}
  wanted['seeds'] = list(range(arguments.seeds))
  losses = earlier(title, arguments.out, wanted)
  todo = [n for n in names if n not in losses or n in (arguments.only or ())]
  with progress.Progress() as bar:
    task = bar.add_task('', total=len(todo) * arguments.seeds * config.steps)
    advance = functools.partial(bar.advance, task)
    for name in todo:
      bar.update(task, description=name)
      contender = STUDIED[name]
      built = build(config, contender, studied[contender.family])
      losses[name] = [
        final_loss(dataclasses.replace(config, seed=seed), built, advance)
        for seed in range(arguments.seeds)
      ]
      leaves = jax.tree.leaves(built.shapes.params)
      size = sum(leaf.size for leaf in leaves)
      result = told(config, studied, size, losses)
      results.save(title, result, draw(result), arguments.out)
      own = result['contenders'][name]
      bar.print(
        f'{name:24} {own["mean"]:.4f}, gap {own["gap"]:+.5f} '
        f'± {own["standard_error"]:.5f}'
      )


if __name__ == '__main__':
  try:
    main()
  except ValueError as error:
    sys.exit(f'error: {error}')
