# SPDX-License-Identifier: Apache-2.0
"""What each recipe needs, as a table and as a figure."""

import dataclasses
import pathlib
from typing import Any

from optax_mp.memory import _report
from optax_mp.memory import _table
from optax_mp.memory import gpt


@dataclasses.dataclass(frozen=True)
class Row:
  """What one recipe needs."""

  name: str
  bytes_per_param: float  # parameters, state, gradients
  report: _report.Report
  layers: int | None = None  # the most that fit, where asked for


def table(rows: list[Row], size: gpt.Size) -> str:
  """The recipes, side by side; GB are 10^9 bytes of each device."""
  header = (
    'recipe', 'bytes/param', 'arguments GB', 'temporaries GB', 'peak GB',
    'of memory', 'fits',
  )  # fmt: skip
  cells: list[tuple[Any, ...]] = []
  for row in rows:
    r = row.report
    sizes = (r.argument_bytes, r.temporary_bytes, r.peak_bytes)
    cell = (
      row.name, row.bytes_per_param, *(n / 1e9 for n in sizes),
      f'{r.share:.0%}', 'yes' if r.fits else 'no',
    )  # fmt: skip
    if row.layers is not None:
      deepest = dataclasses.replace(size, layers=max(row.layers, 1))
      params = deepest.num_params / 1e9 if row.layers else 0.0
      cell += (row.layers, params)
    cells.append(cell)
  if rows[0].layers is not None:
    header += ('most layers', 'B parameters')
  return _table.table(header, cells)


def check(path: str) -> None:
  """Raises before anything is compiled for a figure that cannot be drawn.

  Args:
    path: of the figure.

  Raises:
    ValueError: for a folder or a kind of file that is not there.
  """
  try:
    from matplotlib import backend_bases
  except ImportError as error:
    raise ValueError(
      "`--plot` needs matplotlib. Run: pip install 'optax_mp[examples]'"
    ) from error
  file = pathlib.Path(path)
  kinds = backend_bases.FigureCanvasBase.get_supported_filetypes()
  if file.suffix.removeprefix('.') not in kinds or not file.parent.is_dir():
    raise ValueError(
      f'`--plot` must be a file in a folder that is there, ending in one of '
      f'{", ".join(sorted(kinds))}; got {path!r}.'
    )


def plot(rows: list[Row], title: str, path: str) -> None:
  """Draws what each recipe needs against what the device has.

  Args:
    rows: of the recipes.
    title: of the figure.
    path: of the file; its ending says what kind.
  """
  from matplotlib import figure

  drawn = figure.Figure(
    figsize=(9, 1.5 + 0.4 * len(rows)), layout='constrained'
  )
  axes = drawn.subplots()
  names = [row.name for row in rows]
  left = [0.0] * len(rows)
  for label, value in (
    ('parameters, state, batch', lambda r: r.argument_bytes),
    ('gradients, activations', lambda r: r.peak_bytes - r.argument_bytes),
  ):
    widths = [value(row.report) / 1e9 for row in rows]
    axes.barh(names, widths, left=left, label=label)
    left = [a + b for a, b in zip(left, widths, strict=True)]
  capacity = rows[0].report.capacity_bytes
  if capacity:
    axes.axvline(capacity / 1e9, color='black', linestyle='--', label='memory')
  axes.invert_yaxis()
  axes.set(xlabel='GB of each device', title=title)
  axes.legend()
  drawn.savefig(path, dpi=120)
