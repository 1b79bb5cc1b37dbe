# SPDX-License-Identifier: Apache-2.0
"""What the optimizer's step alone costs: memory, traffic and time.

  python benchmarks/update.py [--pairs 30] [--only NAME ...] [--no-peers]

Each contender, and each peer that is installed, updates one large leaf and 200
small ones: parameters, state and gradients in, parameters and state out, both
donated. Compiled for devices that need not be here: temporaries and bytes moved
per parameter. Measured on JAX's default device: the bytes of all that goes in,
and time as a ratio to `optax.adamw` in float32, which takes its turn before
every step that is timed, so that what slows the machine down slows both. Half
an hour on two cores of a CPU with all peers; `update.json` is written after
each row, so that Ctrl-C leaves what there is.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import functools
import itertools
import os
import pathlib
import time
from typing import Any

from matplotlib import figure
import numpy as np
import optax
from rich import progress
from rich import table

from contenders import CONTENDERS
from contenders import FAMILIES
from contenders import REFERENCE
from optax_mp import memory
import peers
import results

SHAPES: dict[str, peers.Shapes] = {
  'one leaf': [(4096, 4096)],
  '200 leaves': [(256, 256), (1024,)] * 100,
}
# A TPU keeps much of a (4096, 4096) leaf in vector memory, which is no traffic.
LARGE: dict[str, peers.Shapes] = {'large leaf': [(8192, 8192)]}
WARMUP = 3
# Seconds before each step that is timed. The threads of one library wait for
# more work with busy loops: for milliseconds they slow the other one down.
PAUSE = 0.01
_MEASURED = {
  'ratio': '{ratio:.2f}',
  '10-90 %': '{low:.2f} - {high:.2f}',
  'ns': '{nanoseconds:.2f}',
  'bytes': '{bytes:.2f}',
}
_COMPILED = {
  'temporary': '{temporary:.3f}',
  'moved': '{moved:.2f}',
  'accessed': '{accessed:.2f}',
}


def ratios(
  reference: Sequence[float], other: Sequence[float]
) -> dict[str, float]:
  """How many times as long the other took, pair by pair.

  Args:
    reference: seconds, one a pair.
    other: seconds of its partner in each pair.

  Returns:
    The median of the ratios, and between what the middle 80 % of them lie.
  """
  if len(reference) != len(other) or len(other) < 2:
    raise ValueError(
      f'`reference` and `other` must be two or more pairs; got '
      f'{len(reference)} and {len(other)} times.'
    )
  low, median, high = np.percentile(np.divide(other, reference), (10, 50, 90))
  return {'ratio': float(median), 'low': float(low), 'high': float(high)}


def measure(
  reference: peers.Run, other: peers.Run, pairs: int, size: int
) -> dict[str, float]:
  """Times the other optimizer and the reference in turn.

  Returns:
    Ratios; nanoseconds and bytes per parameter, of which there are ``size``.
  """
  for _ in range(WARMUP):
    _seconds(reference)
    _seconds(other)
  times = [(_seconds(reference), _seconds(other)) for _ in range(pairs)]
  before, after = zip(*times, strict=True)
  return ratios(before, after) | {
    'nanoseconds': 1e9 * float(np.median(after)) / size,
    'reference_nanoseconds': 1e9 * float(np.median(before)) / size,
    'bytes': other.num_bytes() / size,
  }


def _seconds(run: peers.Run) -> float:
  run.prepare()
  time.sleep(PAUSE)
  start = time.perf_counter()
  run.step()
  return time.perf_counter() - start


def compiled(
  built: peers.JaxOptimizer, target: str, shapes: peers.Shapes
) -> dict[str, float | None]:
  """What the compiler of a target makes of a step: bytes per parameter."""
  program = memory.compile_for(
    target, built.step, *built.arguments(shapes), donate_argnums=(0, 1)
  )
  report = memory.report(program)
  sizes = {
    'argument': report.argument_bytes,
    'temporary': report.temporary_bytes,
    'moved': report.bytes_moved,
    'accessed': report.bytes_accessed,
  }
  size = peers.num_params(shapes)
  return {k: None if v is None else v / size for k, v in sizes.items()}


def contender(name: str) -> peers.JaxOptimizer:
  """A step of ours or Optax's, `optax.apply_updates` included."""
  made = CONTENDERS[name]
  family = FAMILIES[made.family]
  tx = made.make(family.learning_rate, **family.others)

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return peers.JaxOptimizer(tx.init, step, made.dtype)


def rows(
  only: Sequence[str] | None = None, with_peers: bool = True
) -> dict[str, peers.Peer]:
  """What is compared; ours first, before a peer's import can slow them down."""
  found = {
    name: peers.Peer('optax_mp', functools.partial(contender, name))
    for name, row in CONTENDERS.items()
    if row.family != 'muon'  # whose step is matrix products
  }
  found |= peers.PEERS if with_peers else {}
  return {name: row for name, row in found.items() if name in (only or found)}


def figures(
  name: str,
  row: peers.Peer,
  references: dict[str, peers.Run],
  pairs: int,
  targets: Sequence[str],
) -> dict[str, Any]:
  """All figures of one row; what a peer cannot do is an 'error' among them."""
  told: dict[str, Any] = {'package': row.package, 'version': row.version}
  if row.version is None and name not in CONTENDERS:
    return told | {'error': 'not installed'}
  attempt = functools.partial(_attempt, name)
  built = attempt(row.load)
  if isinstance(built, dict):
    return told | built
  told['measured'] = {
    of: attempt(_measured, built, shapes, references[of], pairs)
    for of, shapes in SHAPES.items()
  }
  if isinstance(built, peers.JaxOptimizer):
    jobs = list(itertools.product(targets, (SHAPES | LARGE).items()))
    # The compilers run beside this process: as many at once as there are cores.
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      found = pool.map(
        lambda job: attempt(compiled, built, job[0], job[1][1]), jobs
      )
      told['compiled'] = {target: {} for target in targets}
      for (target, (of, _)), part in zip(jobs, found, strict=True):
        told['compiled'][target][of] = part
  return told


def _attempt(name: str, part: Callable[..., Any], *args: Any) -> Any:
  try:
    return part(*args)
  except Exception as error:  # whatever a peer raises
    if name in CONTENDERS:
      raise
    return {'error': peers.first_line(error)}


def _measured(built, shapes, reference, pairs) -> dict[str, float]:
  run = built.run(shapes)
  return measure(reference, run, pairs, peers.num_params(shapes))


def tables(result: dict[str, Any]) -> Iterator[table.Table | str]:
  """Times, bytes of each target, and what there is not."""
  told = result['rows']
  measured = {name: row.get('measured', {}) for name, row in told.items()}
  title = f'time of a step / {REFERENCE}; nanoseconds and bytes per parameter'
  yield _table(title, measured, _MEASURED)
  for target in result['targets']:
    parts = {n: r.get('compiled', {}).get(target, {}) for n, r in told.items()}
    yield _table(f'{target}: bytes per parameter', parts, _COMPILED)
  for name, row in told.items():
    yield from (f'{name}: {problem}' for problem in _problems(row))


def _table(title: str, told: Any, formats: dict[str, str]) -> table.Table:
  """A section for each shape."""
  drawn = table.Table('', *formats, title=title, min_width=76)
  for column in drawn.columns[1:]:
    column.justify = 'right'
  for of in dict.fromkeys(of for parts in told.values() for of in parts):
    drawn.add_section()
    drawn.add_row(f'[bold]{of}')
    for name, parts in told.items():
      if 'error' not in parts.get(of, {'error': ''}):
        drawn.add_row(name, *(_cell(parts[of], f) for f in formats.values()))
  return drawn


def _cell(part: dict[str, Any], text: str) -> str:
  try:
    return text.format_map(part)
  except TypeError:  # the compiler for GPUs does not tell accesses
    return '-'


def _problems(row: dict[str, Any]) -> list[str]:
  """Why a row is not complete; the same error for several shapes once."""
  groups = {'': {'': row}, 'measured: ': row.get('measured', {})}
  for target, parts in row.get('compiled', {}).items():
    groups[f'{target}: '] = parts
  found = (
    where + part['error']
    for where, parts in groups.items()
    for part in parts.values()
    if 'error' in part
  )
  return list(dict.fromkeys(found))


def draw(result: dict[str, Any]) -> figure.Figure:
  """Times beside the bytes that each target moves for the large leaf."""
  told, targets = result['rows'], result['targets']
  names = [name for name, row in told.items() if row.get('measured')]
  drawn = figure.Figure(
    figsize=(6 + 3 * len(targets), 1.6 + 0.35 * len(names)),
    layout='constrained',
  )
  axes = drawn.subplots(1, 1 + len(targets), sharey=True, squeeze=False)[0]
  _draw_times(axes[0], [told[name]['measured'] for name in names])
  for target, bars in zip(targets, axes[1:], strict=True):
    parts = [told[name].get('compiled', {}).get(target, {}) for name in names]
    _draw_bytes(bars, target, parts)
  axes[0].set_yticks(range(len(names)), names)
  axes[0].invert_yaxis()
  return drawn


def _draw_times(axes: Any, told: list[dict[str, Any]]) -> None:
  for i, of in enumerate(SHAPES):
    found = [(y, p[of]) for y, p in enumerate(told) if 'ratio' in p[of]]
    y, low, middle, high = np.reshape(
      [(y + 0.2 * i, p['low'], p['ratio'], p['high']) for y, p in found],
      (-1, 4),
    ).T
    errors = [middle - low, high - middle]
    axes.errorbar(middle, y, xerr=errors, fmt='.', capsize=3, label=of)
  axes.axvline(1, color='black', linewidth=0.8)
  axes.set(xscale='log', xlabel=f'time of one step / {REFERENCE}')
  axes.legend()


def _draw_bytes(axes: Any, target: str, told: list[dict[str, Any]]) -> None:
  (large,) = LARGE
  for kind, height in {'moved': 0.7, 'temporary': 0.3}.items():
    sizes = [parts.get(large, {}).get(kind, 0) for parts in told]
    axes.barh(range(len(sizes)), sizes, height, label=kind)
  axes.set(xlabel='bytes per parameter', title=f'{target}, {large}')
  axes.legend()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  """Reads the flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--pairs', type=int, default=30)
  parser.add_argument('--only', action='append', choices=rows())
  parser.add_argument('--targets', nargs='*', default=['tpu-v5e', 'h100'])
  parser.add_argument('--no-peers', action='store_true')
  parser.add_argument('--out', type=pathlib.Path, default=results.FOLDER)
  arguments = parser.parse_args(argv)
  if arguments.pairs < 2:
    parser.error('`--pairs` must be 2 or more: one pair has no spread.')
  return arguments


def main(argv: Sequence[str] | None = None) -> None:
  """Measures and compiles one row after the other."""
  arguments = parse_arguments(argv)
  known = memory.targets()
  targets = [target for target in arguments.targets if target in known]
  result: dict[str, Any] = {
    'reference': REFERENCE,
    'pairs': arguments.pairs,
    'num_params': {of: peers.num_params(s) for of, s in SHAPES.items()},
    'torch_threads': os.cpu_count(),
    'targets': targets,
    'targets_not_installed': sorted(set(arguments.targets) - set(targets)),
    'rows': {},
  }
  # Made once: their arrays stay.
  reference = contender(REFERENCE)
  references = {of: reference.run(shapes) for of, shapes in SHAPES.items()}
  chosen = rows(arguments.only, not arguments.no_peers)
  with progress.Progress() as bar:
    task = bar.add_task('', total=len(chosen))
    for name, row in chosen.items():
      bar.update(task, description=name)
      result['rows'][name] = figures(
        name, row, references, arguments.pairs, targets
      )
      results.save('update', result, draw(result), arguments.out)
      bar.advance(task)
    for part in tables(result):
      bar.console.print(part)


if __name__ == '__main__':
  main()
