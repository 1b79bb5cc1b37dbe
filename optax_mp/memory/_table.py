# SPDX-License-Identifier: Apache-2.0
"""Aligned text for what prints as a table."""

from typing import Any


def table(header: tuple[str, ...], cells: list[tuple[Any, ...]]) -> str:
  """Aligns text to the left and numbers to the right.

  Args:
    header: a word for each column.
    cells: rows as long as the header; a column is as its first cell is, text
      or numbers.

  Returns:
    Lines without trailing blanks.
  """
  text = [header] + [tuple(map(_cell, row)) for row in cells]
  widths = [max(map(len, column)) for column in zip(*text, strict=True)]
  numeric = [not isinstance(cell, str) for cell in cells[0]]
  lines = [
    '  '.join(
      cell.rjust(width) if number else cell.ljust(width)
      for cell, width, number in zip(row, widths, numeric, strict=True)
    )
    for row in text
  ]
  return '\n'.join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
  if isinstance(value, float):
    return f'{value:.2f}'
  return str(value)
