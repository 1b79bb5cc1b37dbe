# SPDX-License-Identifier: Apache-2.0
"""Which buffers a compiled program holds at its peak: what XLA dumps, read.

XLA writes its buffer assignment and live ranges as text when asked by
`xla_dump_to`, also for programs that it then refuses because they do not fit:

  allocation 17: size 197120, preallocated-temp:
   value: <925 fusion.62{0} @0> (size=512,offset=180224): u32[1]{0}
  ...
    fusion.62{0}:25-29

An allocation belongs to an argument, an output or to temporaries; the values of
temporaries share it, each for the steps of its live range.
"""

import collections
from collections.abc import Iterator
import dataclasses
import pathlib
import re

_ALLOCATION = re.compile(r'^allocation (\d+): size (\d+), (.*)$')
_VALUE = re.compile(
  r'^ value: <\d+ ([^\s{]+)(\{[\d,]*\})? @\d+> '
  r'\(size=(\d+),offset=(\d+)\): (.*)$'
)
_RANGE = re.compile(r'^ +(\S+?\{[\d,]*\}):(\d+)-(\d+)$')
_PARAMETER = re.compile(r'\bparameter (\d+),')
# Other memories than the device's main one: TPU vector memory, the host; what
# lies on the stack of a thread.
_ELSEWHERE = re.compile(r'\bcolor [1-9]|thread-local')


@dataclasses.dataclass(frozen=True)
class Buffer:
  """An array in memory at the peak."""

  kind: str  # 'argument', 'output' or 'temporary'
  name: str  # path of an argument, operation that made an output or temporary
  shape: str  # 'bf16[4096,4096]', as XLA writes it
  bytes: int  # padding included


@dataclasses.dataclass(frozen=True)
class _Value:
  name: str
  size: int
  offset: int
  shape: str


@dataclasses.dataclass
class _Allocation:
  size: int
  kind: str
  parameter: int | None
  live_out: bool
  values: list[_Value]


@dataclasses.dataclass(frozen=True)
class Dump:
  """A program's buffers at the peak, and the sums that follow from them."""

  buffers: tuple[Buffer, ...]  # largest first
  sizes: dict[str, int]  # as XLA's `memory_analysis` names them

  @classmethod
  def read(cls, folder: pathlib.Path) -> 'Dump | None':
    """Reads what the last compilation left in a folder.

    Args:
      folder: the value of `xla_dump_to`, emptied before the compilation.

    Returns:
      The dump; None if this XLA writes none, or another text.
    """
    # Small programs on the way (constants to fold) have a smaller one.
    found = sorted(
      folder.glob('*buffer-assignment.txt'), key=lambda p: p.stat().st_size
    )
    if not found:
      return None
    allocations = list(_allocations(found[-1].read_text()))
    ranges = found[-1].with_name(
      found[-1].name.replace('buffer-assignment', 'live-range')
    )
    if not allocations or not ranges.exists():
      return None
    live = _at_peak(allocations, _live_ranges(ranges.read_text()))
    return cls(tuple(live), _sizes(allocations))


def _allocations(text: str) -> Iterator[_Allocation]:
  """The allocations in the device's main memory."""
  current = None
  for line in text.splitlines():
    if match := _ALLOCATION.match(line):
      if current:
        yield current
      size, rest = int(match[2]), match[3]
      number = _PARAMETER.search(rest)
      live_out = 'maybe-live-out' in rest
      kind = 'argument' if number else 'output' if live_out else 'temporary'
      parameter = int(number[1]) if number else None
      current = _Allocation(size, kind, parameter, live_out, [])
      if _ELSEWHERE.search(rest):
        current = None
    elif current and (match := _VALUE.match(line)):
      name = match[1] + (match[2] or '{}')
      shape = re.sub(r'(?<=\])\{[^}]*\}', '', match[5])  # without the layout
      size, offset = int(match[3]), int(match[4])
      current.values.append(_Value(name, size, offset, shape))
    elif not line.startswith(' '):
      if current:
        yield current
      current = None
  if current:
    yield current


def _live_ranges(text: str) -> dict[str, tuple[int, int]]:
  """First and last step of each value."""
  matches = map(_RANGE.match, text.splitlines())
  return {m[1]: (int(m[2]), int(m[3])) for m in matches if m}


def _at_peak(allocations, ranges) -> list[Buffer]:
  """What is held at the step with most temporaries, largest first."""
  buffers, temporaries = [], []
  for number, allocation in enumerate(allocations):
    if allocation.kind == 'temporary':
      temporaries += [(number, v) for v in allocation.values]
    elif whole := [v for v in allocation.values if v.size == allocation.size]:
      # Several values may follow one another in the memory of an argument.
      value = whole[0]
      name = value.name.partition('{')[0]
      if allocation.parameter is not None:
        name = f'parameter {allocation.parameter}'
      buffers.append(
        Buffer(allocation.kind, name, value.shape, allocation.size)
      )
  for value in _most(temporaries, ranges):
    name = value.name.partition('{')[0]
    buffers.append(Buffer('temporary', name, value.shape, value.size))
  # A tuple is a table of pointers to its arrays.
  arrays = [b for b in buffers if not b.shape.startswith('(')]
  return sorted(arrays, key=lambda b: -b.bytes)


def _most(temporaries, ranges) -> list[_Value]:
  """The values that are live when they take most; one of those at one place."""
  starts, ends = collections.defaultdict(list), collections.defaultdict(list)
  for place in temporaries:
    first, last = ranges.get(place[1].name, (0, 0))
    starts[first].append(place)
    ends[last].append(place)
  live, total, best, most = collections.Counter(), 0, [], -1

  def key(place):
    allocation, value = place
    return allocation, value.offset, value.size

  for step in sorted({*starts, *ends}):
    for place in starts[step]:
      live[key(place)] += 1
      total += place[1].size * (live[key(place)] == 1)
    if total > most:
      most, best = total, step
    for place in ends[step]:
      live[key(place)] -= 1
      total -= place[1].size * (live[key(place)] == 0)
  held = {}
  for place in temporaries:
    first, last = ranges.get(place[1].name, (0, 0))
    if first <= best <= last:
      held.setdefault(key(place), place[1])
  return list(held.values())


def _sizes(allocations: list[_Allocation]) -> dict[str, int]:
  """What `memory_analysis` would say, for a program that was refused."""

  def total(wanted):
    return sum(a.size for a in allocations if wanted(a))

  return {
    'argument_size_in_bytes': total(lambda a: a.kind == 'argument'),
    'output_size_in_bytes': total(lambda a: a.live_out),
    'alias_size_in_bytes': total(lambda a: a.live_out and a.kind == 'argument'),
    'temp_size_in_bytes': total(lambda a: a.kind == 'temporary'),
    'generated_code_size_in_bytes': 0,
  }
