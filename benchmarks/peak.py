# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a whole training step, by the compilers of TPU and GPU.

  python benchmarks/peak.py [--model NAME ...] [--target NAME ...]

GPT-2 of 124 M parameters, GPTs of 1 B and 7 B (layers scanned, activations
recomputed, one sequence of 1024), 24 layers of 1024 with next to no embedding
(302 M, one sequence of 256), and the step of `make demo`. Some contenders also
with the update in the backward pass. No device is needed: `memory.compile_for`
runs their compilers here.
"""

import argparse
from concurrent import futures
import dataclasses
import functools
import os
import pathlib
import sys
from typing import Any

import jax
from matplotlib import figure
from rich import progress

from contenders import CONTENDERS
from contenders import Contender
from contenders import FAMILIES
from optax_mp import backward
from optax_mp import memory
from optax_mp.memory import gpt
import results

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'examples'))

import train_gpt

SIZES = {
  '302M': gpt.Size(24, 1024, vocabulary=256, context=256),
  '124M': gpt.Size(12, 768),
  '1B': gpt.Size(18, 2048),
  '7B': gpt.Size(32, 4096),
}
MODELS = (*SIZES, 'demo')
# Hours otherwise: what the others differ by, `bytes.py` says.
COMPILED = [
  name
  for name in CONTENDERS
  if name.startswith(('optax.adamw', 'optax.sgd', 'optax.lion'))
  or '_bf16' in name
  or name in ('adamw_8bit', 'adamw_4bit')
]
IN_BACKWARD = ', in backward'
COMPILED += [
  name + IN_BACKWARD
  for name in ('optax.adamw, bfloat16', 'adamw_bf16', 'adamw_8bit')
]
# What the update in the backward pass does, too: layers are recomputed. All
# models but the demo are, in any case.
RECOMPUTED = 'adamw_bf16, recomputed'
COMPILED.append(RECOMPUTED)
TARGETS = ('h100', 'tpu-v5e')


def compile_gpt(
  size: gpt.Size, contender: Contender, target: str, in_backward: bool
) -> memory.Compiled:
  """Compiles a step of a GPT."""
  tx = contender.make(1e-4)
  params = gpt.shapes(size, contender.dtype)
  init, step = tx.init, gpt.make_step(tx)
  if in_backward:
    fused = backward.fused_step(gpt.loss_around, gpt.block, tx)
    init, step = gpt.in_backward(fused)
  return memory.compile_for(
    target,
    step,
    params,
    jax.eval_shape(init, params),
    gpt.tokens(size),
    donate_argnums=(0, 1),
  )


def compile_demo(
  contender: Contender, target: str, in_backward: bool, recompute: bool
) -> Any:
  """Compiles the step of `make demo`, in bfloat16 as on any accelerator."""
  family = FAMILIES[contender.family]
  config = train_gpt.Config(
    learning_rate=family.learning_rate,
    compute_dtype='bfloat16',
    update='in-backward' if in_backward else 'fused',
    recompute=recompute,
  )

  def compiler(fn, donated, *args):
    return memory.compile_for(target, fn, *args, donate_argnums=donated)

  tx = train_gpt.scheduled(config, contender.make, **family.others)
  built = train_gpt.setup(config, tx, contender.dtype, compiler)
  return built.programs['step']


def measure(model: str, name: str, target: str) -> dict[str, Any]:
  """The report of one step, and its bytes per parameter."""
  in_backward = name.endswith(IN_BACKWARD)
  base = name.removesuffix(IN_BACKWARD).removesuffix(', recomputed')
  contender = CONTENDERS[base]
  if model == 'demo':
    recompute = name == RECOMPUTED
    compiled = compile_demo(contender, target, in_backward, recompute)
  else:
    compiled = compile_gpt(SIZES[model], contender, target, in_backward)
  report = memory.report(compiled).to_dict()
  report['largest'] = report['largest'][:3]
  return report | {'params': num_params(model)}


@functools.cache
def num_params(model: str) -> int:
  """Parameters of a model."""
  if model in SIZES:
    return SIZES[model].num_params
  config = train_gpt.Config()
  built = train_gpt.setup(config, compiler=lambda *_: None)
  return sum(x.size for x in jax.tree.leaves(built.shapes.params))


def plot(steps: dict[str, dict[str, dict[str, dict]]]) -> figure.Figure:
  """Peaks of every model and target, with what the device has."""
  panels = [(m, t) for m, targets in steps.items() for t in targets]
  drawn = figure.Figure((10, 3.2 * len(steps)), layout='constrained')
  columns = len(panels) // len(steps)
  grid = drawn.subplots(len(steps), columns, squeeze=False)
  for axes, (model, target) in zip(grid.flat, panels, strict=True):
    rows = steps[model][target]
    peaks = [r['peak_bytes'] / 1e9 for r in rows.values()]
    colors = ['0.6' if n.startswith('optax') else 'tab:blue' for n in rows]
    bars = axes.barh(list(rows), peaks, color=colors)
    axes.bar_label(bars, fmt=' %.3g', fontsize='small')
    capacity = next(iter(rows.values()))['capacity_bytes'] / 1e9
    if capacity < 4 * max(peaks):
      axes.axvline(capacity, color='tab:red', linestyle='--')
    axes.set(title=f'{model}, {target}', xlabel='peak of a step, GB')
    axes.margins(x=0.15)
    axes.invert_yaxis()
  return drawn


def main(argv: list[str] | None = None) -> None:
  """Compiles everything, draws and writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  add = parser.add_argument
  add('--model', action='append', choices=MODELS)
  add('--target', action='append', choices=memory.targets())
  add('--only', action='append', choices=COMPILED, help='contenders')
  add('--out', type=pathlib.Path, default=results.FOLDER)
  arguments = parser.parse_args(argv)
  # With `--only` or `--model`, the others stay what they were.
  steps: dict[str, Any] = {}
  some = arguments.only or arguments.model
  if some and (arguments.out / 'peak.json').exists():
    steps = results.load('peak', arguments.out)['steps']
  jobs = [
    (model, target, name)
    for model in arguments.model or MODELS
    for target in arguments.target or TARGETS
    for name in arguments.only or COMPILED
    if name != RECOMPUTED or model == 'demo'
  ]
  # The compilers run beside this process: as many at once as there are cores.
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    found = pool.map(lambda job: measure(job[0], job[2], job[1]), jobs)
    for (model, target, name), row in zip(
      jobs, progress.track(found, 'compiling', len(jobs)), strict=True
    ):
      steps.setdefault(model, {}).setdefault(target, {})[name] = row
  for targets in steps.values():
    for target, rows in targets.items():
      targets[target] = {name: rows[name] for name in COMPILED if name in rows}
  steps = {model: steps[model] for model in MODELS if model in steps}
  sizes = {m: dataclasses.asdict(SIZES[m]) for m in steps if m in SIZES}
  results.save(
    'peak', {'sizes': sizes, 'steps': steps}, plot(steps), arguments.out
  )


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')
  main()
