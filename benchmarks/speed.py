# SPDX-License-Identifier: Apache-2.0
"""How fast each contender trains, and in how much memory.

  python benchmarks/speed.py [--only NAME ...] [--layers 17 --batch 8 ...]

Whole training steps of the GPT of `examples/train_gpt.py` on JAX's default
device: forward, backward, clipping, update. The batch is on the device already.
Meant for a GPU or TPU, where the default is a GPT of about GPT-2's 124M
parameters that computes in bfloat16; on a CPU the default is small.

Speed: the contenders take turns, so that drift hits all alike. A round is one
turn of each; each round gives a ratio to AdamW in float32, and what is told is
their median with the 10th and the 90th percentile.

Memory: what the compiler says of the step, and where the device counts, the
peak of a process that runs that contender only, since it never goes down.
Peaks on a CPU say little: XLA:CPU copies donated arrays, others reuse them.
"""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib import figure
import numpy as np
from rich import progress

from contenders import CONTENDERS
from contenders import FAMILIES
from contenders import REFERENCE
import optax_mp
import quality
import results

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'examples'))

import train_gpt

# GPT-2's smallest, with five more layers in place of its 50,257 tokens.
LARGE = train_gpt.Config(
  layers=17,
  width=768,
  heads=12,
  context=1024,
  batch=8,
  compute_dtype='bfloat16',
  recompute=True,
)
SMALL = train_gpt.Config(
  layers=4,
  width=256,
  heads=4,
  context=64,
  batch=12,
  compute_dtype='float32',
)
_SIZES = ('layers', 'width', 'heads', 'context', 'batch')


class Speed(NamedTuple):
  """Of all rounds of a contender."""

  tokens_per_second: float  # the median
  ratio: float  # to the reference, the median
  ratio_p10: float
  ratio_p90: float


def compare(speeds: Sequence[float], reference: Sequence[float]) -> Speed:
  """Puts tokens per second in proportion to those of the same rounds.

  Args:
    speeds: of a contender, one a round.
    reference: of the reference.

  Returns:
    Medians, and how far the ratios spread.
  """
  ratios = np.divide(speeds, reference)
  low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9))
  return Speed(float(np.median(speeds)), float(middle), float(low), float(high))


class Runner(NamedTuple):
  """A contender, compiled; it holds no arrays between its turns."""

  create: Callable[[], train_gpt.State]
  built: train_gpt.Setup


def prepare(config: train_gpt.Config, name: str) -> Runner:
  """Compiles a contender."""
  contender = CONTENDERS[name]
  built = quality.build(config, contender, FAMILIES[contender.family])
  return Runner(jax.jit(built.create), built)


def first_batch(config: train_gpt.Config) -> jax.Array:
  """A batch on the device."""
  text, _ = train_gpt.load_text()
  return jax.device_put(train_gpt.training_batch(text, config, 0))


def turn(runner: Runner, tokens: jax.Array, steps: int) -> float:
  """Trains from new weights; tokens per second, without the first step."""
  state, _ = runner.built.step(runner.create(), tokens)
  jax.block_until_ready(state)
  start = time.perf_counter()
  for _ in range(steps):
    state, loss = runner.built.step(state, tokens)
  jax.block_until_ready((state, loss))
  seconds = time.perf_counter() - start
  batch, context = tokens.shape
  return batch * (context - 1) * steps / seconds


def measure(
  runners: dict[str, Runner],
  tokens: jax.Array,
  rounds: int,
  steps: int,
  bar: progress.Progress,
) -> dict[str, list[float]]:
  """Gives every contender a turn in every round."""
  speeds: dict[str, list[float]] = {name: [] for name in runners}
  task = bar.add_task('', total=rounds * len(runners))
  names = list(runners)
  for i in range(rounds):
    # Another one begins each time: what runs before one may slow it down.
    first = i % len(names)
    for name in names[first:] + names[:first]:
      bar.update(task, description=name)
      speeds[name].append(turn(runners[name], tokens, steps))
      bar.advance(task)
  return speeds


def device_peak(config: train_gpt.Config, name: str) -> int | None:
  """The device's own count after two steps, None if it does not count."""
  if _peak_bytes() is None:
    return None
  contender = CONTENDERS[name]
  built = quality.build(config, contender, FAMILIES[contender.family])
  # Zeros take no more than the state itself, initializers would.
  state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), built.shapes)
  tokens = first_batch(config)
  for _ in range(2):
    state, _ = built.step(state, tokens)
  jax.block_until_ready(state)
  return _peak_bytes()


def _peak_bytes() -> int | None:
  return (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')


def device_peaks(names: Sequence[str]) -> dict[str, int | None]:
  """Runs this program once for each; before JAX takes the device itself."""
  peaks = dict.fromkeys(names)
  for name in names:
    command = [sys.executable, __file__, *sys.argv[1:], '--peak-of', name]
    printed = subprocess.run(
      command, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    peaks[name] = json.loads(printed.splitlines()[-1])
    if peaks[name] is None:
      break  # such a device counts for none of them
  return peaks


def told(
  config: train_gpt.Config,
  arguments: argparse.Namespace,
  runners: dict[str, Runner],
  speeds: dict[str, list[float]],
  peaks: dict[str, int | None],
) -> dict[str, Any]:
  """All that is written down."""
  contenders = {}
  for name, runner in runners.items():
    programs = runner.built.programs.values()
    speed = compare(speeds[name], speeds[REFERENCE])
    contenders[name] = {
      **speed._asdict(),
      'rounds': speeds[name],
      'compiled_peak_bytes': max(
        optax_mp.memory.report(program).peak_bytes for program in programs
      ),
      'device_peak_bytes': peaks[name],
    }
  params = runners[REFERENCE].built.shapes.params
  return {
    'config': {
      field: getattr(config, field)
      for field in (*_SIZES, 'compute_dtype', 'recompute', 'update')
    },
    'rounds': arguments.rounds,
    'steps': arguments.steps,
    'num_params': sum(leaf.size for leaf in jax.tree.leaves(params)),
    'reference': REFERENCE,
    'contenders': contenders,
  }


def draw(result: dict[str, Any]) -> figure.Figure:
  """Speeds relative to float32, and peaks."""
  contenders = result['contenders']
  names, rows = list(contenders), list(contenders.values())
  drawn = figure.Figure(
    figsize=(9, 1.2 + 0.4 * len(names)), layout='constrained'
  )
  left, right = drawn.subplots(1, 2, sharey=True)
  middle = np.array([row['ratio'] for row in rows])
  low = middle - [row['ratio_p10'] for row in rows]
  high = [row['ratio_p90'] for row in rows] - middle
  left.axvline(1, color='black', linewidth=0.8)
  left.errorbar(middle, names, xerr=(low, high), fmt='o', capsize=4)
  left.set(
    xlabel=f'tokens per second relative to\n{REFERENCE} (median, 10-90 %)'
  )
  left.invert_yaxis()
  right.barh(
    names,
    [row['compiled_peak_bytes'] / 1e6 for row in rows],
    height=0.5,
    color='0.7',
    label='of the compiled step',
  )
  counted = [n for n in names if contenders[n]['device_peak_bytes']]
  if counted:
    peaks = [contenders[name]['device_peak_bytes'] / 1e6 for name in counted]
    right.plot(peaks, counted, 'k|', markersize=14, label='of the device')
  right.set(xlabel='peak memory, MB')
  right.legend(loc='lower center', bbox_to_anchor=(0.5, 1), ncols=2)
  return drawn


def parse_arguments() -> argparse.Namespace:
  """Reads the flags; sizes that are not given are the device's default."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  for size in _SIZES:
    parser.add_argument(f'--{size}', type=int)
  parser.add_argument('--recompute', action=argparse.BooleanOptionalAction)
  parser.add_argument('--rounds', type=int, default=10)
  parser.add_argument('--steps', type=int, default=10, help='of one turn')
  parser.add_argument('--only', action='append', choices=CONTENDERS)
  parser.add_argument('--out', type=pathlib.Path, default=results.FOLDER)
  # What this program calls itself with.
  parser.add_argument('--peak-of', choices=CONTENDERS, help=argparse.SUPPRESS)
  return parser.parse_args()


def sized(arguments: argparse.Namespace) -> train_gpt.Config:
  """The model; from here on JAX holds the device."""
  default = SMALL if jax.default_backend() == 'cpu' else LARGE
  flags = {name: getattr(arguments, name) for name in (*_SIZES, 'recompute')}
  given = {name: value for name, value in flags.items() if value is not None}
  return dataclasses.replace(default, **given)


def main() -> None:
  """Measures memory, then speed."""
  arguments = parse_arguments()
  if arguments.peak_of:
    print(json.dumps(device_peak(sized(arguments), arguments.peak_of)))
    return
  wanted = {REFERENCE, *(arguments.only or CONTENDERS)}
  names = [name for name in CONTENDERS if name in wanted]
  peaks = device_peaks(names)
  config = sized(arguments)
  tokens = first_batch(config)
  with progress.Progress() as bar:
    runners = {
      name: prepare(config, name)
      for name in bar.track(names, description='compiling')
    }
    speeds = measure(runners, tokens, arguments.rounds, arguments.steps, bar)
    result = told(config, arguments, runners, speeds, peaks)
    results.save('speed', result, draw(result), arguments.out)
    for name, row in result['contenders'].items():
      bar.print(
        f'{name:24} {row["tokens_per_second"]:10,.0f} tokens/s, '
        f'x {row["ratio"]:.3f} ({row["ratio_p10"]:.3f}-{row["ratio_p90"]:.3f}),'
        f' peak {row["compiled_peak_bytes"] / 1e6:,.1f} MB'
      )


if __name__ == '__main__':
  main()
