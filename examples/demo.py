# SPDX-License-Identifier: Apache-2.0
"""Float32, plain and compensated bfloat16, with and without gradients.

  python examples/demo.py [--steps 800] [--out demo]

Trains the GPT of `train_gpt.py` five times from the same seed, with the same
batches and learning rates: the last time with blocks that are updated in the
backward pass, which recomputes them, and before that with blocks that are only
recomputed. Writes `demo/demo.png` and `demo/demo.json` and prints a table. A
few minutes on a laptop's CPU.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import platform
import statistics
from typing import Any

import flax
import jax
import jax.numpy as jnp
import matplotlib
from matplotlib import pyplot as plt
import numpy as np
import optax
from rich import progress
from rich.console import Console
from rich.table import Table

import files
import optax_mp
import train_gpt

RUNS = {
  'adamw_fp32': 'AdamW, float32',
  'adamw_plain_bf16': 'AdamW, plain bfloat16',
  'adamw_bf16': 'adamw_bf16 (ours)',
  'recomputed': 'ours, recomputed',
  'in_backward': 'ours, in backward',
}
COLORS = {
  'adamw_fp32': 'black',
  'adamw_plain_bf16': 'tab:red',
  'adamw_bf16': 'tab:blue',
  'recomputed': 'tab:purple',
  'in_backward': 'tab:green',
}
# What users think in, and the fields of Optax's states that belong to it.
PARTS = {
  'params': ('params',),
  'residual': ('residual',),
  'moments': ('mu', 'nu'),
  'gradients': ('gradients',),
}


def bytes_per_param(built: train_gpt.Setup, dtype) -> dict[str, float]:
  """Adds up the fields of `memory.plan`.

  Args:
    built: the optimizer, and the parameters' shapes.
    dtype: of gradients; None for those of what is not in a block alone.

  Returns:
    Bytes per parameter of each part, and in total.
  """
  params: Any = built.shapes.params
  plan = optax_mp.memory.plan(built.tx, params, gradients=dtype)
  fields = collections.defaultdict(float)
  for row in plan.rows:
    fields[row.field] += row.bytes_per_param
  parts = {
    part: sum(fields[name] for name in names) for part, names in PARTS.items()
  }
  if dtype is None:
    rest = [part for name, part in params.items() if name != 'blocks']
    bytes = sum(map(train_gpt.size_in_bytes, jax.tree.leaves(rest)))
    parts['gradients'] = bytes / plan.num_params
    return parts | {'total': plan.bytes_per_param + parts['gradients']}
  return parts | {'total': plan.bytes_per_param}


def run(
  config: train_gpt.Config, built: train_gpt.Setup, name: str, bar: Any
) -> dict:
  """Trains once and returns everything that is shown about it."""
  task = bar.add_task(name, total=config.steps)
  curve, seconds = [], []
  for record in train_gpt.train(config, built):
    bar.update(task, completed=record.step)
    seconds.append(record.seconds)
    if record.validation is not None:
      curve.append((record.step, record.validation))
  dtype = jnp.float32 if config.optimizer == 'adamw_fp32' else jnp.bfloat16
  if config.update == 'in-backward':
    dtype = None
  reports = map(optax_mp.memory.report, built.programs.values())
  return {
    'name': name,
    'curve': curve,
    'validation': curve[-1][1],
    'bytes_per_param': bytes_per_param(built, dtype),
    'peak_bytes': max(report.peak_bytes for report in reports),
    'tokens_per_second': config.batch
    * config.context
    / statistics.median(seconds),
  }


def conditions(config: train_gpt.Config, params) -> dict:
  """What the numbers depend on: machine, versions, flags, size."""
  return {
    'machine': {
      'processor': platform.processor() or platform.machine(),
      'cores': os.cpu_count(),
      'device': jax.devices()[0].device_kind,
      'python': platform.python_version(),
      'versions': {m.__name__: m.__version__ for m in (jax, optax, flax)},
    },
    'config': dataclasses.asdict(config),
    'num_params': sum(leaf.size for leaf in jax.tree.leaves(params)),
  }


def plot(results: dict[str, dict], path: pathlib.Path) -> None:
  """Draws validation curves and the memory of each run."""
  matplotlib.use('Agg')
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 4.2), layout='constrained'
  )
  for key, result in results.items():
    steps, losses = zip(*result['curve'], strict=True)
    left.plot(
      steps,
      losses,
      color=COLORS[key],
      label=result['name'],
      linestyle={'adamw_fp32': '-', 'adamw_plain_bf16': '-'}.get(key, ':'),
    )
  left.set(xlabel='step', ylabel='validation loss (nats per byte)')
  # The first steps, equal for all, would leave no room for the differences.
  left.set_ylim(top=np.quantile(losses, 0.85))
  left.legend()

  names = [result['name'].replace(' ', '\n', 1) for result in results.values()]
  bottom = np.zeros(len(names))
  right.set_prop_cycle(color=['0.35', 'tab:orange', 'tab:green', '0.75'])
  for part in PARTS:
    heights = [r['bytes_per_param'][part] for r in results.values()]
    right.bar(names, heights, bottom=bottom, label=part, width=0.6)
    bottom += heights
  right.bar_label(right.containers[-1], labels=[f'{x:.1f}' for x in bottom])
  right.set(ylabel='bytes per parameter', ylim=(0, 1.3 * bottom.max()))
  right.legend(ncols=len(PARTS), loc='upper center', fontsize='small')
  figure.savefig(path, dpi=120)


def table(results: dict[str, dict]) -> Table:
  """Puts the runs side by side."""
  out = Table(title='The same GPT, seed, batches and learning rates')
  out.add_column()
  for result in results.values():
    out.add_column(result['name'], justify='right')
  reference = results['adamw_fp32']['validation']

  def row(name, value):
    out.add_row(name, *(value(result) for result in results.values()))

  row('validation loss', lambda r: f'{r["validation"]:.4f}')
  row('gap to float32', lambda r: f'{r["validation"] - reference:+.4f}')
  out.add_section()
  for part in (*PARTS, 'total'):
    row(f'{part}, B/param', lambda r, p=part: f'{r["bytes_per_param"][p]:.2f}')
  out.add_section()
  row('peak MB of a step', lambda r: f'{r["peak_bytes"] / 1e6:.1f}')
  row('tokens/s', lambda r: f'{r["tokens_per_second"]:,.0f}')
  out.caption = (
    'Most of the peak of so small a model is activations, and XLA:CPU copies '
    'donated arrays where GPUs and TPUs do not.'
  )
  return out


def main() -> None:
  """Trains, plots, prints."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--steps', type=int, default=800)
  parser.add_argument('--out', type=pathlib.Path, default='demo')
  arguments = parser.parse_args()
  results = {}
  with progress.Progress() as bar:
    for key, name in RUNS.items():
      config = train_gpt.Config(
        optimizer=key if key.startswith('adamw') else 'adamw_bf16',
        update='in-backward' if key == 'in_backward' else 'fused',
        recompute=key == 'recomputed',
        steps=arguments.steps,
        validate_every=50,
      )
      built = train_gpt.setup(config)
      results[key] = run(config, built, name, bar)
  arguments.out.mkdir(parents=True, exist_ok=True)
  plot(results, arguments.out / 'demo.png')
  told = conditions(config, built.shapes.params) | {'runs': results}
  text = json.dumps(told, indent=1) + '\n'
  files.write_text(arguments.out / 'demo.json', text)
  Console().print(table(results))


if __name__ == '__main__':
  main()
