# SPDX-License-Identifier: Apache-2.0
"""Reads optimized HLO: what each operation came from, what memory it moves.

Between two operations of an optimized program lies memory, inside a fusion do
registers. So the bytes that a program moves are those of the operands and the
results of the operations outside of fusions, times the trips of the loops they
are in. The exception is a slice: of an array that a fusion only slices, or
updates a slice of in place, just the slice is moved.
"""

import collections
import dataclasses
import re

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^ +(ROOT )?%?([\w.\-]+) = (.*)$')
_ARRAY = re.compile(r'([a-z]+)(\d*)[a-z0-9]*\[([\d,]*)\](\{[^}]*\})?')
_NAMES = re.compile(r'%([\w.\-]+)')
_CALLED = re.compile(r'(?:calls|to_apply|body)=%?([\w.\-]+)')
_BRANCHES = re.compile(
  r'(?:branch_computations=\{([^}]*)\}|'
  r'true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+))'
)
_TRIPS = re.compile(r'known_trip_count\D+(\d+)')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')

# Names for what is there already.
_FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast',
  'after-all', 'opt-barrier', 'partition-id', 'replica-id', 'add-dependency',
  'iota',
}  # fmt: skip
_SLICES = {'dynamic-slice', 'slice', 'gather'}


@dataclasses.dataclass(frozen=True)
class _Instruction:
  root: bool
  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  rest: str  # attributes, for a parameter its number

  @property
  def bytes(self) -> int:
    """Of the result, in the device's main memory."""
    return sum(map(_array_bytes, _ARRAY.finditer(self.shape)))


class Program:
  """An optimized HLO module: its computations by name."""

  def __init__(self, text: str):
    self.computations: dict[str, list[_Instruction]] = {}
    self.entry = ''
    current: list[_Instruction] = []
    for line in text.splitlines():
      if header := _COMPUTATION.match(line):
        current = self.computations.setdefault(header[2], [])
        self.entry = header[2] if header[1] else self.entry
      elif match := _INSTRUCTION.match(line):
        current.append(_parse(bool(match[1]), match[2], match[3]))

  def op_names(self) -> dict[str, str]:
    """The JAX operation that each instruction came from."""
    return {
      i.name: match[1].replace("\\'", "'")
      for instructions in self.computations.values()
      for i in instructions
      if (match := _OP_NAME.search(i.rest))
    }

  def bytes_moved(self) -> int:
    """Bytes read from and written to memory in one run of the program."""
    return self._moved(self.entry)

  def _moved(self, computation: str) -> int:
    instructions = self.computations.get(computation, [])
    shapes = {i.name: i for i in instructions}
    return sum(self._moved_by(i, shapes) for i in instructions)

  def _moved_by(self, i: _Instruction, shapes) -> int:
    if i.opcode in _FREE or i.opcode.endswith('-done'):
      return 0
    called = _CALLED.findall(i.rest)
    if i.opcode == 'while':
      trips = _TRIPS.search(i.rest)
      return int(trips[1] if trips else 1) * self._moved(called[0])
    if i.opcode == 'conditional':
      branches = _BRANCHES.findall(i.rest)
      names = re.findall(r'[\w.\-]+', ' '.join(' '.join(b) for b in branches))
      return max(map(self._moved, names), default=0)
    if i.opcode in ('call', 'async-start') and called:
      return sum(map(self._moved, called))
    operands = [shapes[name] for name in i.operands if name in shapes]
    if i.opcode == 'fusion' and called:
      return self._moved_by_fusion(i, called[0], operands)
    if i.opcode in _SLICES:
      return 2 * i.bytes
    if i.opcode == 'dynamic-update-slice':
      return 2 * operands[1].bytes
    if i.opcode.endswith('slice-start'):
      return _moved_by_slice(i)
    if i.opcode.endswith('-start') and i.shape.startswith('('):
      return i.bytes  # the result names operands and results
    return i.bytes + sum(operand.bytes for operand in operands)

  def _moved_by_fusion(self, fusion: _Instruction, computation, operands):
    inside = self.computations[computation]
    by_name = {i.name: i for i in inside}
    users = collections.defaultdict(list)
    for i in inside:
      for name in i.operands:
        users[name].append(i)
    # Outside it says in which memory an array is, inside it does not.
    moved = 0
    for i in inside:
      if i.opcode == 'parameter':
        moved += min(operands[int(i.rest)].bytes, _read(i, users))
    root = next(i for i in inside if i.root)
    results = list(map(_array_bytes, _ARRAY.finditer(fusion.shape)))
    written = _written(root, by_name)
    if len(results) != len(written):  # the root is no tuple, its shape is
      return moved + sum(results)
    return moved + sum(map(min, results, written))


def _moved_by_slice(i: _Instruction) -> int:
  """A copy of part of an array, from or to a TPU's vector memory.

  The result is `((operands), result, context)`.
  """
  arrays = list(_ARRAY.finditer(i.shape))
  source, result = arrays[0], arrays[len(i.operands)]
  part = arrays[1] if 'update' in i.opcode else result
  ends = (part if 'update' in i.opcode else source), result
  return sum(_size(part) for end in ends if not _elsewhere(end))


def _read(i: _Instruction, users) -> int:
  """What a fusion reads of its operand: all, or only slices."""
  total = 0
  for user in users[i.name]:
    first = user.operands[0] == i.name
    if user.opcode == 'bitcast':
      total += _read(user, users)
    elif user.opcode in _SLICES and first:
      total += user.bytes
    elif not (user.opcode == 'dynamic-update-slice' and first):
      return i.bytes
  return total


def _written(root: _Instruction, by_name) -> list[int]:
  """What a fusion writes: its results, of an update in place only the slice."""
  if root.opcode == 'tuple':
    return [
      n for name in root.operands for n in _written(by_name[name], by_name)
    ]
  source = root
  while source.opcode == 'bitcast':
    source = by_name[source.operands[0]]
  if source.opcode == 'dynamic-update-slice':
    return [by_name[source.operands[1]].bytes]
  return [root.bytes]


def _parse(root: bool, name: str, text: str) -> _Instruction:
  """Takes apart `shape opcode(operands), attributes`."""
  end = _closing(text) if text.startswith('(') else text.index(' ')
  shape, text = text[:end], text[end:].lstrip()
  opcode, _, text = text.partition('(')
  end = _closing('(' + text) - 1
  operands, rest = text[: end - 1], text[end:]
  names = tuple(_NAMES.findall(operands))
  rest = operands if opcode == 'parameter' else rest
  return _Instruction(root, name, shape, opcode, names, rest)


def _closing(text: str) -> int:
  """The place behind the parenthesis that closes the first one."""
  depth = 0
  for match in re.finditer(r'[()]', text):
    depth += 1 if match[0] == '(' else -1
    if not depth:
      return match.end()
  return len(text)


def _array_bytes(match: re.Match) -> int:
  """Of `bf16[8,128]{1,0}`; none for an array in another memory."""
  return 0 if _elsewhere(match) else _size(match)


def _elsewhere(match: re.Match) -> bool:
  return 'S(' in (match[4] or '')


def _size(match: re.Match) -> int:
  kind, bits, dims, _ = match.groups()
  if kind == 'token':
    return 0
  size = 1
  for dim in filter(None, dims.split(',')):
    size *= int(dim)
  return -(-size * int(bits or 8) // 8)
