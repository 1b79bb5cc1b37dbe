# SPDX-License-Identifier: Apache-2.0
"""How long a step takes whose backward pass updates the layers.

  python benchmarks/in_backward.py [--pairs 30 --steps 4 ...]

The GPT of `examples/train_gpt.py`, whole training steps on JAX's default
device, against the step that it replaces: `jax.checkpoint` around each scanned
layer, then the update of all of them. The two take turns, first one and then
the other of them first; each pair gives a ratio, told is their median with the
10th and the 90th percentile.
"""

import argparse
from collections.abc import Callable
import dataclasses
import pathlib
import sys
import time
from typing import Any

import jax
from matplotlib import figure
import numpy as np
import optax
from rich import progress

from contenders import CONTENDERS
from contenders import FAMILIES
import results

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'examples'))

import train_gpt

CONFIG = train_gpt.Config(
  layers=8, width=256, heads=4, context=64, batch=8, recompute=True
)
NAMES = ('optax.adamw, float32', 'adamw_bf16', 'adamw_8bit')
# What `backward.fused_step` is asked for; with `max_norm` the ordinary step
# clips, too.
OPTIONS = {
  'one pass': {},
  "max_norm, 'previous'": {'max_norm': 1.0, 'norm_mode': 'previous'},
  "max_norm, 'exact'": {'max_norm': 1.0},
  'skip_nonfinite': {'skip_nonfinite': True},
}
Step = Callable[..., Any]


def ordinary(config: train_gpt.Config, tx: Any) -> tuple[Step, Step]:
  """The step that is replaced -> `init(params)` and the step."""
  loss_fn = train_gpt.loss_of(config)

  def step(params, state, tokens):
    loss, gradients = jax.value_and_grad(loss_fn)(params, tokens)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss

  return tx.init, step


def prepare(config: train_gpt.Config, name: str, options: dict[str, Any]):
  """Both steps of a contender, compiled, and what each starts with."""
  contender = CONTENDERS[name]
  family = FAMILIES[contender.family]
  tx: Any = contender.make(family.learning_rate, **family.others)
  fused, whole = train_gpt.in_backward(
    config, tx, **(options or {'policy': None})
  )
  guarded = optax.apply_if_finite(tx, 5) if 'skip_nonfinite' in options else tx
  if 'max_norm' in options:
    clip = optax.clip_by_global_norm(options['max_norm'])
    guarded = optax.chain(clip, guarded)
  steps = {
    'ordinary': ordinary(config, guarded),
    'in backward': (whole.init, fused),
  }
  text, _ = train_gpt.load_text()
  tokens = jax.device_put(train_gpt.training_batch(text, config, 0))
  create = train_gpt.setup(config, tx, contender.dtype, lambda *_: None).create
  turns = {}
  for key, (init, step) in steps.items():
    jitted = jax.jit(step, donate_argnums=(0, 1))
    turns[key] = Turn(jitted, create().params, init, tokens)
  return turns


class Turn:
  """One of the two, and how far it has trained."""

  def __init__(self, step: Step, params: Any, init: Step, tokens: Any):
    self.step, self.tokens = step, tokens
    self.params, self.state = params, init(params)
    self(2)  # compiles, and warms up

  def __call__(self, steps: int) -> float:
    """Seconds of some steps."""
    start = time.perf_counter()
    for _ in range(steps):
      self.params, self.state, loss = self.step(
        self.params, self.state, self.tokens
      )
    jax.block_until_ready((self.params, self.state, loss))
    return time.perf_counter() - start


def measure(turns: dict[str, Turn], pairs: int, steps: int) -> dict[str, Any]:
  """Ratio of the times, and the times of a step."""
  seconds: dict[str, list[float]] = {name: [] for name in turns}
  for i in range(pairs):
    for name in list(turns)[:: 1 if i % 2 else -1]:
      seconds[name].append(turns[name](steps) / steps)
  ratios = np.divide(seconds['in backward'], seconds['ordinary'])
  low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9))
  medians = {name: float(np.median(times)) for name, times in seconds.items()}
  return {
    'ratio': float(middle),
    'low': float(low),
    'high': float(high),
    'seconds': medians,
  }


def draw(rows: dict[str, dict[str, Any]]) -> figure.Figure:
  """Ratios, with what most pairs lie between."""
  drawn = figure.Figure((8, 0.9 + 0.35 * len(rows)), layout='constrained')
  axes = drawn.subplots()
  middle = np.array([row['ratio'] for row in rows.values()])
  low = middle - [row['low'] for row in rows.values()]
  high = [row['high'] for row in rows.values()] - middle
  axes.axvline(1, color='black', linewidth=0.8)
  axes.errorbar(middle, list(rows), xerr=(low, high), fmt='o', capsize=4)
  axes.set(xlabel='time of a step, relative to the ordinary one')
  axes.invert_yaxis()
  return drawn


def main(argv: list[str] | None = None) -> None:
  """Measures, draws and writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  sizes = ('layers', 'width', 'heads', 'context', 'batch')
  for size in sizes:
    parser.add_argument(f'--{size}', type=int, default=getattr(CONFIG, size))
  parser.add_argument('--pairs', type=int, default=30)
  parser.add_argument('--steps', type=int, default=4, help='of one turn')
  parser.add_argument('--out', type=pathlib.Path, default=results.FOLDER)
  arguments = parser.parse_args(argv)
  given = {size: getattr(arguments, size) for size in sizes}
  config = dataclasses.replace(CONFIG, **given)
  # Options cost the same whatever the optimizer.
  jobs = [(name, 'one pass') for name in NAMES]
  jobs += [(NAMES[0], option) for option in OPTIONS if option != 'one pass']
  rows = {}
  for name, option in progress.track(jobs, 'measuring'):
    turns = prepare(config, name, OPTIONS[option])
    label = name if option == 'one pass' else f'{name}, {option}'
    rows[label] = measure(turns, arguments.pairs, arguments.steps)
    print(label, rows[label])
  told = {
    'config': given | {'recompute': True},
    'pairs': arguments.pairs,
    'steps': arguments.steps,
    'rows': rows,
  }
  results.save('in_backward', told, draw(rows), arguments.out)


if __name__ == '__main__':
  main()
