# SPDX-License-Identifier: Apache-2.0
"""Writes the numbers of README.md: `make readme`.

Tables stand between `<!-- begin NAME -->` and `<!-- end NAME -->`. Bytes come
from `memory.plan`, losses and speeds from `benchmarks/results/demo.json`, which
`make demo` wrote; a test compares the README with what this script makes.
"""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import optax

import optax_mp
from optax_mp import formats
from optax_mp import memory

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / 'README.md'
DEMO = ROOT / 'benchmarks' / 'results' / 'demo.json'
PARTS = ('params', 'residual', 'moments', 'gradients')

RECIPES = [
  ('`optax.adamw`, float32', optax.adamw(1e-3), jnp.float32),
  ('`adamw_bf16`', optax_mp.adamw_bf16(1e-3), jnp.bfloat16),
  ('`adamw_bf16`, 8', optax_mp.adamw_bf16(1e-3, residual_bits=8), jnp.bfloat16),
  ('`adamw_bf16`, 0', optax_mp.adamw_bf16(1e-3, residual_bits=0), jnp.bfloat16),
  ('`optax.sgd`, momentum, float32', optax.sgd(0.1, momentum=0.9), jnp.float32),
  ('`sgdm_bf16`', optax_mp.sgdm_bf16(0.1), jnp.bfloat16),
  ('`optax.lion`, float32', optax.lion(1e-4), jnp.float32),
  ('`lion_bf16`', optax_mp.lion_bf16(1e-4), jnp.bfloat16),
]
FORMATS = [
  (formats.Split(16), 'exact', 'no', 'a float32, cut in two'),
  (formats.Split(8), '16 bits', 'no', 'the default of the recipes'),
  (formats.BFloat16('stochastic'), '8 bits, unbiased', 'yes', 'the smallest'),
  (formats.BFloat16(), '8 bits', 'no', 'first moments only'),
]


def recipes() -> str:
  """Bytes per parameter of each recipe, in parts."""
  rows = []
  for name, tx, dtype in RECIPES:
    params = {'w': jax.ShapeDtypeStruct((8192, 8192), dtype)}
    plan = memory.plan(tx, params, gradients=dtype)
    parts = dict.fromkeys(PARTS, 0.0)
    for row in plan.rows:
      known = row.field if row.field in parts else 'moments'
      parts[known] += row.bytes_per_param
    values = [*parts.values(), plan.bytes_per_param]
    rows.append([name, *(f'{value:.0f}' for value in values)])
  return _table(['recipe, residual bits', *PARTS, 'total'], rows)


def formats_table() -> str:
  """What each format needs and keeps."""
  rows = [
    [
      f'`{_call(f)}`',
      f'{_bytes(f):.0f}',
      *say,
    ]
    for f, *say in FORMATS
  ]
  return _table(['format', 'bytes', 'significant', 'key?', ''], rows)


def demo() -> str:
  """The demo's runs: loss, gap, bytes, peak, speed."""
  runs = json.loads(DEMO.read_text())['runs']
  reference = runs['adamw_fp32']['validation']
  rows = [
    [
      run['name'],
      f'{run["validation"]:.4f}',
      f'{run["validation"] - reference:+.4f}',
      f'{run["bytes_per_param"]["total"]:.1f}',
      f'{run["peak_bytes"] / 1e6:.1f}',
      f'{run["tokens_per_second"]:,.0f}',
    ]
    for run in runs.values()
  ]
  head = ['', 'validation loss', 'gap', 'B/param', 'peak MB', 'tokens/s (CPU)']
  return _table(head, rows)


def headline() -> str:
  """One sentence with one number and its conditions."""
  result = json.loads(DEMO.read_text())
  runs, config = result['runs'], result['config']
  ours, full, plain = (
    runs[k] for k in ('adamw_bf16', 'adamw_fp32', 'adamw_plain_bf16')
  )
  size = ours['bytes_per_param']['total'], full['bytes_per_param']['total']
  gaps = [run['validation'] - full['validation'] for run in (ours, plain)]
  millions = result['num_params'] / 1e6
  return '\n'.join(
    [
      f'AdamW in **{size[0]:.0f} bytes per parameter instead of '
      f'{size[1]:.0f}**, gradients included: on a',
      f'byte-level GPT of {millions:.1f} M parameters, after '
      f'{config["steps"]} steps of one seed, the validation',
      f'loss is {gaps[0]:+.4f} from float32; plain bfloat16 is '
      f'{gaps[1]:+.4f} from it.',
    ]
  )


def filled(text: str) -> str:
  """The README with every block made anew."""
  blocks = {
    'headline': headline,
    'demo': demo,
    'recipes': recipes,
    'formats': formats_table,
  }
  for name, make in blocks.items():
    begin, end = f'<!-- begin {name} -->', f'<!-- end {name} -->'
    assert begin in text and end in text, name
    block = f'{begin}\n{make()}\n{end}'
    text = re.sub(f'{begin}.*?{end}', lambda _, b=block: b, text, flags=re.S)
  return text


def _table(head: list[str], rows: list[list[str]]) -> str:
  lines = [head, ['---'] + ['---:'] * (len(head) - 1), *rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def _bytes(format: formats.Format) -> float:
  return formats.bits_per_value(format, (8192, 8192)) / 8


def _call(format: formats.Format) -> str:
  """`Split(8)`: as one writes it, without defaults."""
  if isinstance(format, formats.Split):
    return f'Split({format.residual_bits})'
  default = format == formats.BFloat16()
  return 'BFloat16()' if default else "BFloat16('stochastic')"


if __name__ == '__main__':
  README.write_text(filled(README.read_text()))
