# SPDX-License-Identifier: Apache-2.0
"""Bytes per parameter of every recipe, counted from shapes.

  python benchmarks/bytes.py

Parameters, what stands beside them, moments and the gradient of a large matrix,
counted by `memory.plan`; beside them what the authors of other libraries say of
theirs. Optax's AdamW in float32 takes as much as float32 weights and moments
with a working copy and gradients in bfloat16: 16 bytes either way.
"""

import argparse
import pathlib
from typing import Any

import jax
from matplotlib import figure

from contenders import CONTENDERS
from contenders import Contender
from optax_mp import memory
import results

PARTS = ('params', 'residual', 'moments', 'gradients')
SHAPE = (8192, 8192)

# Of AdamW, gradients included; by their authors, not measured here.
PUBLISHED = {
  'FlashOptim, 8-bit moments, 24-bit weights': (7, 'arXiv 2602.23349'),
  'FlashOptim, the same, gradients released': (5, 'arXiv 2602.23349'),
  'optimi, bfloat16 with Kahan summation': (10, 'optimi, documentation'),
}


def measure(contender: Contender) -> dict[str, float]:
  """Bytes per parameter, in parts and in total."""
  params = {'w': jax.ShapeDtypeStruct(SHAPE, contender.dtype)}
  plan = memory.plan(contender.make(1e-3), params, gradients=contender.dtype)
  parts = dict.fromkeys(PARTS, 0.0)
  for row in plan.rows:
    known = row.field if row.field in parts else 'moments'
    parts[known] += row.bytes_per_param
  return parts | {'total': plan.bytes_per_param}


def plot(rows: dict[str, dict[str, float]]) -> figure.Figure:
  """Bars of the parts, one above the other."""
  drawn = figure.Figure((9, 1.5 + 0.35 * len(rows)), layout='constrained')
  axes = drawn.subplots()
  left = [0.0] * len(rows)
  for part in PARTS:
    widths = [row[part] for row in rows.values()]
    bars = axes.barh(list(rows), widths, left=left, label=part)
    left = [a + b for a, b in zip(left, widths, strict=True)]
  axes.bar_label(bars, labels=[f' {total:.0f}' for total in left])
  axes.invert_yaxis()
  axes.set(xlabel='bytes per parameter', xlim=(0, 1.1 * max(left)))
  axes.legend()
  return drawn


def compute() -> dict[str, Any]:
  """All that is written down."""
  published = [
    {'name': name, 'total': total, 'source': source}
    for name, (total, source) in PUBLISHED.items()
  ]
  counted = {name: measure(c) for name, c in CONTENDERS.items()}
  return {'shape': SHAPE, 'counted': counted, 'published': published}


def main(argv: list[str] | None = None) -> None:
  """Counts, draws and writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--out', type=pathlib.Path, default=results.FOLDER)
  arguments = parser.parse_args(argv)
  told = compute()
  results.save('bytes', told, plot(told['counted']), arguments.out)
  for name, row in told['counted'].items():
    print(f'{name:24} {row["total"]:5.2f}')


if __name__ == '__main__':
  main()
