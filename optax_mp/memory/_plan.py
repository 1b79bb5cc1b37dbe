# SPDX-License-Identifier: Apache-2.0
"""The bytes of parameters, state and gradients, counted from shapes alone."""

import collections
from collections.abc import Iterator
import dataclasses
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optax_mp import formats
from optax_mp.formats import _base
from optax_mp.formats import _leaves as _leaves_of
from optax_mp.formats import _paths
from optax_mp.formats import _rule
from optax_mp.memory import _table

# The field, what is stored, and what a rule decided if one did.
_Found: TypeAlias = tuple[str, Any, _rule.Choice | None]


@dataclasses.dataclass(frozen=True)
class Row:
  """The arrays of one field that are kept in one way."""

  field: str  # 'params', 'residual', 'mu', ..., 'gradients'
  format: str  # dtypes of what is stored, 'bfloat16 + uint8'
  values: int  # numbers stored, of the array that the format stands for
  bits: int  # in total, scales and residuals included
  bytes_per_param: float
  note: str = ''  # why leaves are kept so, where that is not plain

  @property
  def bits_per_value(self) -> float:
    """Bits of storage for each value."""
    return self.bits / self.values if self.values else 0.0

  @property
  def bytes(self) -> int:
    """Bytes in total, rounded up."""
    return -(-self.bits // 8)


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One floating-point array of a state that a rule decided on."""

  path: str  # in the state of its wrapper, as the rule sees it
  shape: tuple[int, ...]
  format: str  # 'BlockInt(bits=8, ...)', or a dtype where it has none
  bits_per_value: float
  note: str  # 'one scale a row: ...', 'fewer than min_size=4096 values'


@dataclasses.dataclass(frozen=True)
class Plan:
  """The bytes of parameters, state and gradients; prints as a table."""

  rows: tuple[Row, ...]
  num_params: int
  leaves: tuple[Leaf, ...] = ()

  @property
  def total_bytes(self) -> int:
    """Bytes of everything in the plan."""
    return -(-sum(row.bits for row in self.rows) // 8)

  @property
  def bytes_per_param(self) -> float:
    """Bytes of everything in the plan for each parameter."""
    bits = sum(row.bits for row in self.rows)
    return bits / 8 / self.num_params if self.num_params else 0.0

  def __str__(self) -> str:
    header = ('field', 'format', 'bits/value', 'bytes', 'bytes/param')
    cells: list[tuple[Any, ...]] = [
      (r.field, r.format, r.bits_per_value, r.bytes, r.bytes_per_param)
      for r in self.rows
    ]
    cells.append(('total', '', '', self.total_bytes, self.bytes_per_param))
    if any(row.note for row in self.rows):
      header += ('note',)
      notes = [row.note for row in self.rows] + ['']
      cells = [(*cell, note) for cell, note in zip(cells, notes, strict=True)]
    return _table.table(header, cells)

  def by_leaf(self) -> str:
    """A table of ``leaves``: what each is kept in, and why."""
    header = ('path', 'shape', 'bits/value', 'format', 'note')
    cells = [
      (x.path, str(x.shape), x.bits_per_value, x.format, x.note)
      for x in self.leaves
    ]
    return _table.table(header, cells) if cells else ''


def plan(
  tx: optax.GradientTransformation,
  params: Any,
  gradients: Any = jnp.bfloat16,
) -> Plan:
  """Counts the bytes of training with ``tx``, field by field.

  Allocates nothing and compiles nothing: it traces ``tx.init``. Counts the bits
  of each dtype, so an int4 is half a byte. Activations, temporaries and padding
  are not in it; for those see :func:`report`.

  Args:
    tx: any Optax transformation, of this library or not.
    params: arrays, or ShapeDtypeStructs, as ``jax.eval_shape`` returns them.
    gradients: dtype of the gradients of 16-bit parameters, those of others have
      their parameter's; or None where no gradient is ever whole.

  Returns:
    A :class:`Plan`: ``rows``, ``total_bytes``, ``bytes_per_param``; ``leaves``
    and ``by_leaf()`` say what rules decided for each array of the state.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_mp
    >>> params = {'w': jax.ShapeDtypeStruct((80, 8192, 106496), jnp.bfloat16)}
    >>> print(optax_mp.memory.plan(optax_mp.adamw_bf16(1e-4), params))
    field        format            bits/value         bytes  bytes/param
    params       bfloat16               16.00  139586437120         2.00
    count        int32                  32.00             4         0.00
    mu           bfloat16 + uint8       24.00  209379655680         3.00
    nu           bfloat16 + uint8       24.00  209379655680         3.00
    noise_count  uint32                 32.00             8         0.00
    residual     uint16                 16.00  139586437120         2.00
    gradients    bfloat16               16.00  139586437120         2.00
    total                                      837518622732        12.00
  """
  params = _leaves_of.checked(params, 'params')
  # As JAX would keep them: NumPy's float64 becomes float32 there.
  params_leaves = jax.tree.leaves(jax.eval_shape(lambda p: p, params))
  paths = _paths.param_paths(params)
  with _rule.recording(True):
    state = jax.eval_shape(tx.init, params)
  stored = list(_leaves(state))
  parts = _paths.split_paths([path for path, *_ in stored], paths)
  found: list[_Found] = [('params', leaf, None) for leaf in params_leaves]
  found += [
    (_field(parts[path][0]), leaf, choice) for path, leaf, choice in stored
  ]
  if gradients is not None:
    found += [
      ('gradients', jax.ShapeDtypeStruct(leaf.shape, dtype), None)
      for leaf, dtype in _gradient_dtypes(params_leaves, gradients)
    ]
  num_params = sum(leaf.size for leaf in params_leaves)
  leaves = tuple(_leaf(choice, leaf) for _, leaf, choice in stored if choice)
  return Plan(_rows(found, num_params), num_params, leaves)


def _leaves(
  state: Any,
) -> Iterator[tuple[_paths.Path, Any, _rule.Choice | None]]:
  """Path, what is stored there, and what was decided if a rule did."""
  nodes = jax.tree_util.tree_leaves_with_path(
    state, is_leaf=lambda x: _is_decided(x) or formats.is_stored(x)
  )
  for path, node in nodes:
    if not _is_decided(node):
      yield path, node, None
      continue
    places = node.treedef.unflatten(range(node.treedef.num_leaves))
    places = jax.tree_util.tree_leaves_with_path(places)
    leaves = node.treedef.flatten_up_to(node.state)
    for (end, _), leaf, choice in zip(
      places, leaves, node.choices, strict=True
    ):
      yield (*path, *end), leaf, choice


def _is_decided(x: Any) -> bool:
  return isinstance(x, _rule.Decided)


def _leaf(choice: _rule.Choice, stored: Any) -> Leaf:
  size = _values(stored, choice)
  bits_per_value = _bits(stored) / size if size else 0.0
  format = _format(stored) if choice.format is None else repr(choice.format)
  return Leaf(choice.path, choice.shape, format, bits_per_value, choice.note)


def _rows(found: list[_Found], num_params: int) -> tuple[Row, ...]:
  """Adds up the leaves that share field and format, in order of appearance."""
  groups = collections.defaultdict(list)
  for field, leaf, choice in found:
    note = choice.note if choice else ''
    groups[field, _format(leaf), note].append((leaf, choice))
  rows = []
  for (field, format, note), leaves in groups.items():
    bits = sum(_bits(leaf) for leaf, _ in leaves)
    values = sum(_values(leaf, choice) for leaf, choice in leaves)
    per_param = bits / 8 / num_params if num_params else 0.0
    rows.append(Row(field, format, values, bits, per_param, note))
  return tuple(rows)


def _bits(stored: Any) -> int:
  return sum(map(_base.array_bits, jax.tree.leaves(stored)))


def _values(stored: Any, choice: _rule.Choice | None) -> int:
  """Numbers of the array that a stored leaf stands for."""
  largest = max((x.size for x in jax.tree.leaves(stored)), default=0)
  # Under `vmap` the choice is that of one member, and codes have more axes.
  return largest if choice is None else max(largest, math.prod(choice.shape))


def _gradient_dtypes(leaves: list[Any], dtype: Any) -> list[tuple[Any, Any]]:
  """Parameters that have a gradient, and its dtype."""
  try:
    dtype = jnp.dtype(dtype)
  except TypeError as error:
    raise ValueError(
      f'`gradients` must be a dtype or None; got {dtype!r}.'
    ) from error
  return [
    (leaf, dtype if _base.dtype_bits(leaf.dtype) == 16 else leaf.dtype)
    for leaf in leaves
    if jnp.issubdtype(leaf.dtype, jnp.inexact)
  ]


def _field(path: Any) -> str:
  """The name of the state field that a leaf belongs to."""
  names = _paths.fields(path)
  return names[-1] if names else 'state'


def _format(leaf: Any) -> str:
  """How a leaf is stored: its dtypes."""
  return ' + '.join(str(x.dtype) for x in jax.tree.leaves(leaf))
