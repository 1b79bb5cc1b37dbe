# SPDX-License-Identifier: Apache-2.0
"""Writes the numbers of both READMEs: `make readme`.

Tables stand between `<!-- begin NAME -->` and `<!-- end NAME -->`. Their
numbers are in `benchmarks/results/*.json`, which the benchmarks and `make demo`
wrote; a test compares the pages with what this script makes.
"""

import dataclasses
import pathlib
import re
import sys
from typing import Any

from contenders import PAPERS
from contenders import REFERENCE
from optax_mp import formats
from published import OURS
from published import PUBLISHED
import results

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'examples'))

import files

ROOT = pathlib.Path(__file__).parents[1]

FORMATS = [
  (formats.Split(16), 'exact', 'a float32, cut in two'),
  (formats.Split(8), '16 bits', 'moments of `adamw_bf16`'),
  (
    formats.BFloat16('stochastic'),
    '8 bits, unbiased',
    'the simplest small one',
  ),
  (formats.BlockInt(8), 'half a code', 'momenta'),
  (
    formats.BlockInt(8, map='sqrt_log'),
    'half a code, ratios of small ones',
    'first moments of Adam',
  ),
  (
    formats.BlockInt(8, signed=False, rounding='stochastic'),
    'ratios, unbiased',
    'second moments',
  ),
  (formats.Float8(), '4 bits and more', "COAT's, range expanded"),
  (
    formats.BlockInt(4, map='softsign', rounding='stochastic'),
    'unbiased',
    'first moments in half a byte',
  ),
  (
    formats.BlockInt(4, signed=False, rounding='stochastic'),
    'ratios, unbiased',
    'second moments in half a byte',
  ),
  (formats.Factored(), 'rows x columns', 'second moments of matrices'),
]
# What a method asks for, or is for; its numbers stand beside it.
WHEN = {
  'adamw_snsm': 'momentum in a subspace; `topk` rows need no SVD',
  'fira': 'low rank, the rest of the gradient scaled alike; SVDs',
  'galore': 'low rank; SVDs',
  'apollo': 'random directions, no SVD',
  'grass': 'rows; a run long enough to select most of them',
  'adamw_sn': 'a second moment for each row',
  'adam_mini': "AdamW's settings, a second moment for each neuron or head",
  'came': 'momentum in full, rows and columns; warm-up',
  'adalomo': 'rows and columns alone, in the backward pass',
  'micro_adam': 'sparse gradients with error feedback',
  'lomo': 'SGD in the backward pass',
}
# Recipes of the README; the others are in the tables of benchmarks/README.md.
MAIN = (
  'optax.adamw, float32',
  'optax.adamw, bfloat16',
  'adamw_bf16',
  'adamw_8bit',
  'adamw_4bit',
  'sgdm_8bit',
)
# Models and targets of `benchmarks/peak.py`.
PEAKS = [('124M', 'h100'), ('124M', 'tpu-v5e'), ('7B', 'h100')]
UPDATE_TARGETS = ('h100', 'tpu-v5e')
DEMO = {
  'adamw_fp32': 'optax.adamw, float32',
  'adamw_plain_bf16': 'optax.adamw, bfloat16',
  'adamw_bf16': 'adamw_bf16',
  'recomputed': 'adamw_bf16, recomputed',
  'in_backward': 'adamw_bf16, in backward',
}


def headline() -> str:
  """One sentence with one number and its conditions."""
  counted = results.load('bytes')['counted']
  quality = results.load('quality')
  sizes = [counted[n]['total'] for n in ('adamw_8bit', 'adamw_bf16', REFERENCE)]
  eight, bf16, plain = (
    _gap(quality['contenders'][name])
    for name in ('adamw_8bit', 'adamw_bf16', 'optax.adamw, bfloat16')
  )
  millions = quality['num_params'] / 1e6
  return '\n'.join(
    [
      f'AdamW in **{sizes[0]:.0f} bytes per parameter** (`adamw_8bit`) or '
      f'**{sizes[1]:.0f}** (`adamw_bf16`) instead of {sizes[2]:.0f},',
      f'gradients included: the validation losses of a GPT of '
      f'{millions:.1f} M parameters end {eight}',
      f'and {bf16} from float32 (mean and standard error of '
      f'{len(quality["seeds"])} seeds);',
      f'plain bfloat16 ends {plain} from it.',
    ]
  )


def recipes() -> str:
  """Each recipe: bytes, loss, peaks of whole steps."""
  counted = results.load('bytes')['counted']
  quality = results.load('quality')['contenders']
  steps = results.load('peak')['steps']
  rows = [
    [
      f'`{name}`',
      f'{counted[name]["total"]:.3g}',
      _gap(quality[name]) if _has_gap(quality, name) else '',
      *(_peak(steps[model][target].get(name)) for model, target in PEAKS),
    ]
    for name in MAIN
  ]
  head = ['recipe', 'B/param', 'loss, gap to float32']
  return _table(head + [f'{m}, {t}' for m, t in PEAKS], rows)


def update() -> str:
  """The optimizer's step alone, ours and others'."""
  rows = []
  for name, row in results.load('update')['rows'].items():
    measured = row.get('measured', {}).get('one leaf', {})
    programs = row.get('compiled', {})
    cells = [f'`{name}`', _cell(measured, '{bytes:.1f}')]
    for target in UPDATE_TARGETS:
      large = programs.get(target, {}).get('large leaf', {})
      cells += [_cell(large, '{temporary:.1f}'), _cell(large, '{moved:.1f}')]
    cells.append(_cell(measured, '{ratio:.1f} ({low:.1f}-{high:.1f})'))
    if any(cells[1:]):
      rows.append(cells)
  head = ['update', 'B/param']
  for target in UPDATE_TARGETS:
    head += [f'{target}: temporary', 'moved']
  return _table([*head, 'time, CPU'], rows)


def demo() -> str:
  """The demo's runs: loss, bytes, speed, and the peaks of its step."""
  runs = results.load('demo')['runs']
  steps = results.load('peak')['steps']['demo']
  rows = [
    [
      run['name'],
      f'{run["validation"]:.4f}',
      f'{run["bytes_per_param"]["total"]:.1f}',
      f'{run["tokens_per_second"]:,.0f}',
      f'{run["peak_bytes"] / 1e6:.1f}',
      *(f'{_data(rows[DEMO[key]]) / 1e6:.1f}' for rows in steps.values()),
    ]
    for key, run in runs.items()
  ]
  head = ['', 'validation loss', 'B/param', 'tokens/s (CPU)', 'peak MB: CPU']
  return _table([*head, *steps], rows)


def in_backward() -> str:
  """Time and memory of a step that updates layers in the backward pass."""
  rows = [
    [f'`{name}`', '{ratio:.2f} ({low:.2f}-{high:.2f})'.format(**row)]
    for name, row in results.load('in_backward')['rows'].items()
  ]
  return _table(['step', 'time, CPU'], rows)


def saved() -> str:
  """What the update in the backward pass takes off a peak."""
  steps = results.load('peak')['steps']['302M']
  ends = ', in backward'
  names = [n for n in next(iter(steps.values())) if n.endswith(ends)]
  rows = []
  for name in names:
    cells = [f'`{name.removesuffix(ends)}`']
    for target in UPDATE_TARGETS:
      before, after = (
        steps[target][n] for n in (name.removesuffix(ends), name)
      )
      cells += [
        f'{before["peak_bytes"] / 1e9:.2f} -> {after["peak_bytes"] / 1e9:.2f}',
        f'{after["peak_bytes"] / before["peak_bytes"] - 1:+.0%}',
      ]
    rows.append(cells)
  head = ['302M, GB']
  for target in UPDATE_TARGETS:
    head += [target, '']
  return _table(head, rows)


def kept() -> str:
  """What each format needs and keeps."""
  rows = [[f'`{_call(f)}`', f'{_bytes(f):.2f}', *say] for f, *say in FORMATS]
  return _table(['format', 'bytes', 'keeps', 'for'], rows)


def peaks() -> str:
  """Peaks of all models on all targets."""
  steps = results.load('peak')['steps']
  pairs = [(model, target) for model in steps for target in steps[model]]
  rows = [
    [f'`{name}`', *(_peak(steps[m][t][name]) for m, t in pairs)]
    for name in next(iter(next(iter(steps.values())).values()))
  ]
  return _table(['peak', *(f'{m}, {t}' for m, t in pairs)], rows)


def quality() -> str:
  """Losses and gaps."""
  return _losses('quality')


def moments() -> str:
  """The same of AdamW alone, by how moments are stored."""
  return _losses('quality_b2_0.999')


def decays() -> str:
  """The same with the other decay of second moments."""
  return _losses('quality_b2_0.95')


def _losses(name: str) -> str:
  rows = [
    [
      f'`{name}`',
      f'{row["mean"]:.4f}',
      _gap(row) if row['reference'] != name else '',
      f'`{row["reference"]}`',
    ]
    for name, row in results.load(name)['contenders'].items()
  ]
  return _table(['contender', 'loss', 'gap', 'to'], rows)


def tracking() -> str:
  """Errors of updates made from stored moments, by pair of formats."""
  runs = results.load('tracking')['runs']
  names = [*PUBLISHED, *OURS]
  rows = [
    [f'`{name}`' if name in OURS else name]
    + [
      _percents(run['pairs'][name], field)
      for field in ('update', 'stored')
      for run in runs.values()
    ]
    + [_octaves(run['pairs'][name]) for run in runs.values()]
    for name in names
  ]
  head = [f'{x}, b2 = {b2}' for x in ('update', 'stored') for b2 in runs]
  return _table(['moments', *head, *(f'nu, {b2}' for b2 in runs)], rows)


def _percents(tensors: dict[str, dict[str, float]], field: str) -> str:
  return ' / '.join(f'{100 * row[field]:.1f}' for row in tensors.values())


def _octaves(tensors: dict[str, dict[str, float]]) -> str:
  return ' / '.join(f'{row["nu bias"]:+.2f}' for row in tensors.values())


def speed() -> str:
  """Tokens per second and compiled peaks."""
  rows = [
    [
      f'`{name}`',
      f'{row["tokens_per_second"]:,.0f}',
      f'{row["ratio"]:.2f} ({row["ratio_p10"]:.2f}-{row["ratio_p90"]:.2f})',
      f'{row["compiled_peak_bytes"] / 1e6:.1f}',
    ]
    for name, row in results.load('speed')['contenders'].items()
  ]
  return _table(['contender', 'tokens/s', 'ratio', 'peak MB'], rows)


def speed_h200() -> str:
  """The same of a GPT of the size of GPT-2 on a GPU, with real peaks."""
  folder = results.FOLDER / 'h200'
  rows = [
    [
      f'`{name}`',
      f'{row["tokens_per_second"]:,.0f}',
      f'{row["ratio"]:.2f} ({row["ratio_p10"]:.2f}-{row["ratio_p90"]:.2f})',
      f'{row["compiled_peak_bytes"] / 1e9:.2f}',
      f'{row["device_peak_bytes"] / 1e9:.2f}',
    ]
    for name, row in results.load('speed', folder)['contenders'].items()
  ]
  head = ['contender', 'tokens/s', 'ratio', 'peak GB: compiled', 'measured']
  return _table(head, rows)


def _papers() -> dict[str, Any]:
  """Rows of both runs; AdamW's of the first."""
  found = dict(results.load('papers')['contenders'])
  for name, row in results.load('papers_more')['contenders'].items():
    found.setdefault(name, row)
  return {name: found[name] for name in PAPERS}


def papers() -> str:
  """Papers' optimizers: state, loss beside AdamW's, and when."""
  found = _papers()
  names = sorted(WHEN, key=lambda name: found[name]['gap'])
  rows = [
    [
      f'`{name}`',
      f'{found[name]["bytes"]:.2f}',
      _gap(found[name]),
      WHEN[name],
    ]
    for name in names
  ]
  return _table(['optimizer', 'state, B', 'loss, gap to AdamW', 'when'], rows)


def papers_found() -> str:
  """All that was trained, with the rates that were found."""
  rows = [
    [
      f'`{name}`',
      f'{row["bytes"]:.2f}',
      f'{row["learning_rate"]:g}' + ('' if row['bracketed'] else ' (an end)'),
      f'{len(row["search"])}',
      f'{row["mean"]:.4f}',
      _gap(row),
    ]
    for name, row in _papers().items()
  ]
  head = ['optimizer', 'state, B', 'rate', 'of', 'loss', 'gap']
  return _table(head, rows)


def published() -> str:
  """What others say of theirs."""
  rows = [
    [row['name'], f'{row["total"]}', row['source']]
    for row in results.load('bytes')['published']
  ]
  return _table(['library', 'B/param', 'source'], rows)


PAGES = {
  ROOT / 'README.md': (headline, recipes, papers, kept),
  ROOT / 'benchmarks' / 'README.md': (
    demo,
    update,
    peaks,
    saved,
    in_backward,
    quality,
    moments,
    decays,
    papers_found,
    tracking,
    speed,
    speed_h200,
    published,
  ),
}


def filled(page: pathlib.Path) -> str:
  """A page with every block made anew."""
  text = page.read_text()
  for make in PAGES[page]:
    name = make.__name__
    begin, end = f'<!-- begin {name} -->', f'<!-- end {name} -->'
    assert begin in text and end in text, name
    block = f'{begin}\n{make()}\n{end}'
    text = re.sub(f'{begin}.*?{end}', lambda _, b=block: b, text, flags=re.S)
  return text


def _table(head: list[str], rows: list[list[str]]) -> str:
  lines = [head, ['---'] + ['---:'] * (len(head) - 1), *rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def _gap(row: dict[str, Any]) -> str:
  return f'{row["gap"]:+.4f} ± {row["standard_error"]:.4f}'


def _has_gap(rows: dict[str, Any], name: str) -> bool:
  return name in rows and rows[name]['reference'] != name


def _peak(row: dict[str, Any] | None) -> str:
  """GB, struck through where they are more than the device has."""
  if row is None:
    return ''
  text = f'{row["peak_bytes"] / 1e9:.3g} GB'
  return text if row['fits'] else f'~~{text}~~'


def _data(row: dict[str, Any]) -> int:
  return row['peak_bytes'] - row['generated_code_bytes']


def _cell(figures: dict[str, Any], text: str) -> str:
  """Empty where a library was not measured, or failed."""
  return '' if not figures or 'error' in figures else text.format(**figures)


def _bytes(format: formats.Format) -> float:
  return formats.bits_per_value(format, (8192, 8192)) / 8


def _call(format: Any) -> str:
  """`Split(8)`: as one writes it, without defaults."""
  first, *_ = fields = dataclasses.fields(format) or [None]
  arguments = [
    (f.name, getattr(format, f.name))
    for f in fields
    if f
    and (getattr(format, f.name) != f.default or f.name == 'residual_bits')
    or f
    and f.name == 'bits'
  ]
  written = (
    repr(value) if first and name == first.name else f'{name}={value!r}'
    for name, value in arguments
    # The map that goes with the sign.
    if (name, value) not in (('map', 'sqrt'), ('map', 'log'))
  )
  return f'{type(format).__name__}({", ".join(written)})'


if __name__ == '__main__':
  for path in PAGES:
    files.write_text(path, filled(path))
