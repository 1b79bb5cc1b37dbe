# SPDX-License-Identifier: Apache-2.0
"""Reads optimized HLO, as XLA prints it."""

import dataclasses
import math
import re

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^ +(ROOT )?%?([\w.\-]+) = (.*)$')
_ARRAY = re.compile(r'([a-z]+)(\d*)[a-z0-9]*\[([\d,]*)\](\{[^}]*\})?')
_TILE = re.compile(r'\{([\d,]*):T\(([\d,]+)\)')
_NAMES = re.compile(r'%([\w.\-]+)')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape: `bf16[8,128]{1,0:T(8,128)(2,1)S(1)}`."""

  size: int  # bytes, with the padding of a TPU's tiles
  elsewhere: bool  # in another memory than the device's main one

  @property
  def bytes(self) -> int:
    """In the device's main memory."""
    return 0 if self.elsewhere else self.size


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One operation."""

  root: bool  # whether its result is that of its computation
  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]  # names
  rest: str  # attributes; of a parameter its number, of a constant its value

  @property
  def arrays(self) -> list[Array]:
    """Of the result, tuples flattened."""
    return [_array(match) for match in _ARRAY.finditer(self.shape)]

  @property
  def bytes(self) -> int:
    """Of the result, in the device's main memory."""
    return sum(array.bytes for array in self.arrays)


class Program:
  """An optimized HLO module: its computations by name."""

  def __init__(self, text: str):
    self.computations: dict[str, list[Instruction]] = {}
    self.entry = ''
    current: list[Instruction] = []
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


def _parse(root: bool, name: str, text: str) -> Instruction:
  """Takes apart `shape opcode(operands), attributes`."""
  end = _closing(text) if text.startswith('(') else text.index(' ')
  shape, text = text[:end], text[end:].lstrip()
  opcode, _, text = text.partition('(')
  end = _closing('(' + text) - 1
  operands, rest = text[: end - 1], text[end:]
  names = tuple(_NAMES.findall(operands))
  rest = operands if opcode in ('parameter', 'constant') else rest
  return Instruction(root, name, shape, opcode, names, rest)


def _closing(text: str) -> int:
  """The place behind the parenthesis that closes the first one."""
  depth = 0
  for match in re.finditer(r'[()]', text):
    depth += 1 if match[0] == '(' else -1
    if not depth:
      return match.end()
  return len(text)


def _array(match: re.Match) -> Array:
  kind, bits, dims, layout = match.groups(default='')
  sizes = [int(dim) for dim in filter(None, dims.split(','))]
  if tile := _TILE.match(layout):
    order = [int(axis) for axis in filter(None, tile[1].split(','))]
    sizes = [sizes[axis] for axis in reversed(order)]  # the last one is minor
    for n, side in enumerate(reversed(tile[2].split(',')), start=1):
      if n <= len(sizes):
        sizes[-n] = -(-sizes[-n] // int(side)) * int(side)
  size = -(-math.prod(sizes) * int(bits or 8) // 8)
  return Array(0 if kind == 'token' else size, 'S(' in layout)
