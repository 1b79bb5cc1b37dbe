# SPDX-License-Identifier: Apache-2.0
"""What memory an optimized program moves.

Between two operations of an optimized program lies memory, inside a fusion do
registers. So the bytes that a program moves are those of the operands and the
results of the operations outside of fusions, times the trips of the loops they
are in. The exception is a slice: of an array that a fusion only slices, or
updates a slice of in place, just the slice is moved. (An array that is sliced
after arithmetic counts as a whole: there the figure is an upper bound.)
"""

import collections
import re

from optax_mp.memory import _hlo

_CALLED = re.compile(r'(?:calls|to_apply|body)=%?([\w.\-]+)')
_CONDITION = re.compile(r'condition=%?([\w.\-]+)')
_BRANCHES = re.compile(
  r'(?:branch_computations=\{([^}]*)\}|'
  r'true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+))'
)
_TRIPS = re.compile(r'known_trip_count\D+(\d+)')
_INDEX = re.compile(r'index=(\d+)')

# Names for what is there already.
_FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast',
  'after-all', 'opt-barrier', 'partition-id', 'replica-id', 'add-dependency',
  'iota',
}  # fmt: skip
_SLICES = {'dynamic-slice', 'slice', 'gather'}
# They write in place; which operand has what they write.
_UPDATES = {'dynamic-update-slice': 1, 'scatter': 2}

_ByName = dict[str, _hlo.Instruction]


class Traffic:
  """Bytes read from and written to main memory in one run of a program."""

  def __init__(self, program: _hlo.Program):
    self.computations = {
      name: {i.name: i for i in instructions}
      for name, instructions in program.computations.items()
    }
    self.unknown_loops = 0  # their trips depend on data: counted as one
    self.bytes = self._of(program.entry)

  def _of(self, computation: str) -> int:
    inside = self.computations.get(computation, {})
    return sum(self._by(i, inside) for i in inside.values())

  def _by(self, i: _hlo.Instruction, around: _ByName) -> int:
    if i.opcode in _FREE or i.opcode.endswith('-done'):
      return 0
    called = _CALLED.findall(i.rest)
    if i.opcode == 'while':
      trips = self._trips(i, around)
      self.unknown_loops += trips is None
      return (1 if trips is None else trips) * self._of(called[0])
    if i.opcode == 'conditional':
      branches = ' '.join(' '.join(b) for b in _BRANCHES.findall(i.rest))
      return max(map(self._of, re.findall(r'[\w.\-]+', branches)), default=0)
    if i.opcode in ('call', 'async-start') and called:
      return sum(map(self._of, called))
    operands = [around[name] for name in i.operands if name in around]
    if i.opcode == 'fusion' and called:
      return self._by_fusion(i, called[0], operands)
    if i.opcode in _SLICES:
      return 2 * i.bytes
    if i.opcode in _UPDATES:
      return 2 * operands[_UPDATES[i.opcode]].bytes
    if i.opcode.endswith('slice-start'):
      return _by_slice_start(i)
    if i.opcode.endswith('-start') and i.shape.startswith('('):
      return i.bytes  # the result names operands and results
    return i.bytes + sum(operand.bytes for operand in operands)

  def _by_fusion(self, fusion, computation: str, operands) -> int:
    inside = self.computations[computation]
    users = collections.defaultdict(list)
    for i in inside.values():
      for name in i.operands:
        users[name].append(i)
    # Outside it says in which memory an array is, inside it does not.
    read = sum(
      min(operands[int(i.rest)].bytes, _read(i, users))
      for i in inside.values()
      if i.opcode == 'parameter'
    )
    root = next(i for i in inside.values() if i.root)
    results = [array.bytes for array in fusion.arrays]
    written = _written(root, inside)
    if len(results) != len(written):  # the root is no tuple, its shape is
      return read + sum(results)
    return read + sum(map(min, results, written))

  def _trips(self, loop: _hlo.Instruction, around: _ByName) -> int | None:
    """How often a loop runs; None if that depends on its data.

    XLA says so for CPUs and GPUs. For TPUs it is in the condition, that a
    counter is less than a constant: JAX's loops count in steps of one.
    """
    if known := _TRIPS.search(loop.rest):
      return int(known[1])
    condition = _CONDITION.search(loop.rest)
    inside = self.computations.get(condition[1], {}) if condition else {}
    root = next((i for i in inside.values() if i.root), None)
    if root is None or 'direction=LT' not in root.rest:
      return None
    counter, bound = (inside[name] for name in root.operands)
    state = around.get(loop.operands[0])
    index = _INDEX.search(counter.rest)
    if index is None or state is None or state.opcode != 'tuple':
      return None
    start = around.get(state.operands[int(index[1])])
    if outside := _INDEX.search(bound.rest):  # the bound is part of the state
      bound = around.get(state.operands[int(outside[1])])
    first, last = _constant(start, around), _constant(bound, around | inside)
    return None if first is None or last is None else last - first


def _constant(i: _hlo.Instruction | None, around: _ByName) -> int | None:
  while i is not None and i.opcode == 'copy':
    i = around.get(i.operands[0])
  if i is None or i.opcode != 'constant':
    return None
  return int(i.rest) if re.fullmatch(r'-?\d+', i.rest) else None


def _by_slice_start(i: _hlo.Instruction) -> int:
  """A copy of part of an array, from or to a TPU's vector memory.

  The result is `((operands), result, context)`.
  """
  arrays = i.arrays
  result = arrays[len(i.operands)]
  if 'update' in i.opcode:
    source = part = arrays[1]
  else:
    source, part = arrays[0], result
  return sum(part.size for end in (source, result) if not end.elsewhere)


def _read(i: _hlo.Instruction, users) -> int:
  """What a fusion reads of its operand: all, or only slices."""
  total = 0
  for user in users[i.name]:
    first = user.operands[0] == i.name
    if user.opcode == 'bitcast':
      total += _read(user, users)
    elif user.opcode in _SLICES and first:
      total += user.bytes
    elif not (user.opcode in _UPDATES and first):
      return i.bytes
  return total


def _written(root: _hlo.Instruction, inside: _ByName) -> list[int]:
  """What a fusion writes: its results, of an update in place only the slice."""
  if root.opcode == 'tuple':
    return [n for name in root.operands for n in _written(inside[name], inside)]
  source = root
  while source.opcode == 'bitcast':
    source = inside[source.operands[0]]
  if source.opcode in _UPDATES:
    return [inside[source.operands[_UPDATES[source.opcode]]].bytes]
  return [root.bytes]
