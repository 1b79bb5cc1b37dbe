# SPDX-License-Identifier: Apache-2.0
"""The page of clients has a line for each transformation."""

import re

from clients import runs
from clients import table


def lines(page):
  text = page.split('<!-- begin table -->')[1].split('<!-- end table -->')[0]
  return [line.split('|') for line in text.splitlines() if line.startswith('|')]


def test_the_page_has_all_transformations():
  """At least 12, by five clients; ours is within what the tests allow."""
  head, _, *rows, seeds = lines(table.PAGE.read_text())
  assert [row[1].strip(' `') for row in rows] == list(runs.OURS)
  assert len(runs.TESTED) >= 12 and len(head) >= 5 + 4
  spreads = [float(re.sub('[^0-9.]', '', cell)) for cell in seeds[3:-1]]
  for row, told in zip(rows, runs.OURS.values(), strict=True):
    for cell, spread in zip(row[3:-1], spreads, strict=True):
      theirs, ours = map(float, cell.split('→'))
      # 0.002: the numbers are rounded to the third digit.
      assert abs(ours - theirs) <= told.share * spread + 0.002, row


def test_the_script_writes_between_the_marks():
  page = 'a\n<!-- begin table -->\nold\n<!-- end table -->\nb'
  assert table.filled(page, 'new\n') == page.replace('old', 'new')
