# SPDX-License-Identifier: Apache-2.0
"""How much memory training takes: from shapes, and from a compiled program."""

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_mp import formats
from optax_mp.formats import _base
from optax_mp.formats import _paths


@dataclasses.dataclass(frozen=True)
class Row:
  """The arrays of one field that are kept in one way."""

  field: str  # 'params', 'residual', 'mu', ..., 'gradients'
  format: str  # dtypes of what is stored, 'bfloat16 + uint8'
  values: int  # numbers stored, of the array that the format stands for
  bits: int  # in total, scales and residuals included
  bytes_per_param: float

  @property
  def bits_per_value(self) -> float:
    """Bits of storage for each value."""
    return self.bits / self.values if self.values else 0.0

  @property
  def bytes(self) -> int:
    """Bytes in total, rounded up."""
    return -(-self.bits // 8)


@dataclasses.dataclass(frozen=True)
class Plan:
  """The bytes of parameters, state and gradients; prints as a table."""

  rows: tuple[Row, ...]
  num_params: int

  @property
  def total_bytes(self) -> int:
    """Bytes of everything in the plan."""
    return -(-sum(row.bits for row in self.rows) // 8)

  @property
  def bytes_per_param(self) -> float:
    """Bytes of everything in the plan for each parameter."""
    return sum(row.bytes_per_param for row in self.rows)

  def __str__(self) -> str:
    header = ('field', 'format', 'bits/value', 'bytes', 'bytes/param')
    cells: list[tuple[Any, ...]] = [
      (r.field, r.format, r.bits_per_value, r.bytes, r.bytes_per_param)
      for r in self.rows
    ]
    cells.append(('total', '', '', self.total_bytes, self.bytes_per_param))
    return _table(header, cells)


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
    A :class:`Plan`: ``rows``, ``total_bytes``, ``bytes_per_param``.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_mp
    >>> params = {'w': jax.ShapeDtypeStruct((80, 8192, 106496), jnp.bfloat16)}
    >>> print(optax_mp.memory.plan(optax_mp.adamw_bf16(1e-4), params))
    field      format            bits/value         bytes  bytes/param
    params     bfloat16               16.00  139586437120         2.00
    count      int32                  32.00             4         0.00
    mu         bfloat16 + uint8       24.00  209379655680         3.00
    nu         bfloat16 + uint8       24.00  209379655680         3.00
    rng_key    uint32                 32.00            16         0.00
    residual   uint16                 16.00  139586437120         2.00
    gradients  bfloat16               16.00  139586437120         2.00
    total                                    837518622740        12.00
  """
  leaves = jax.tree.leaves(params)
  paths = _paths.param_paths(params)
  state = jax.eval_shape(tx.init, params)
  found = [('params', leaf) for leaf in leaves]
  stored = jax.tree_util.tree_leaves_with_path(state, is_leaf=formats.is_stored)
  parts = _paths.split_paths([path for path, _ in stored], paths)
  found += [(_field(parts[path][0]), leaf) for path, leaf in stored]
  if gradients is not None:
    found += [
      ('gradients', jax.ShapeDtypeStruct(leaf.shape, dtype))
      for leaf, dtype in _gradient_dtypes(leaves, gradients)
    ]
  num_params = sum(leaf.size for leaf in leaves)
  return Plan(_rows(found, num_params), num_params)


@dataclasses.dataclass(frozen=True)
class Report:
  """What a compiled program needs, in bytes; prints as a table.

  ``jax_debug_nans`` switches donation off: then ``alias_bytes`` is 0.
  """

  argument_bytes: int
  output_bytes: int
  alias_bytes: int  # outputs that reuse the memory of a donated argument
  temporary_bytes: int
  generated_code_bytes: int
  peak_bytes: int  # arguments + outputs - aliased + temporaries + code

  def __str__(self) -> str:
    cells = [
      (name.removesuffix('_bytes').replace('_', ' '), size)
      for name, size in dataclasses.asdict(self).items()
    ]
    return _table(('memory', 'bytes'), cells)


def report(compiled: jax.stages.Compiled) -> Report:
  """Reads how much memory a compiled program needs.

  Args:
    compiled: ``jax.jit(step, donate_argnums=...).lower(...).compile()``.

  Returns:
    A :class:`Report`.

  Raises:
    ValueError: if the backend does not tell.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_mp
    >>> double = jax.jit(lambda x: 2 * x, donate_argnums=0)
    >>> compiled = double.lower(jnp.ones((256, 256))).compile()
    >>> report = optax_mp.memory.report(compiled)
    >>> report.argument_bytes, report.alias_bytes, report.temporary_bytes
    (262144, 262144, 0)
  """
  stats = compiled.memory_analysis()
  if stats is None:
    raise ValueError(
      f'`compiled` does not tell its memory: got {compiled!r} of a backend '
      'without `memory_analysis`. Compile for the CPU, a GPU or a TPU.'
    )
  sizes = {
    'argument_bytes': stats.argument_size_in_bytes,
    'output_bytes': stats.output_size_in_bytes,
    'alias_bytes': stats.alias_size_in_bytes,
    'temporary_bytes': stats.temp_size_in_bytes,
    'generated_code_bytes': stats.generated_code_size_in_bytes,
  }
  peak = sum(sizes.values()) - 2 * sizes['alias_bytes']
  return Report(**sizes, peak_bytes=peak)


def _rows(found: list[tuple[str, Any]], num_params: int) -> tuple[Row, ...]:
  """Adds up the leaves that share field and format, in order of appearance."""
  groups = collections.defaultdict(list)
  for field, leaf in found:
    groups[field, _format(leaf)].append(leaf)
  rows = []
  for (field, format), leaves in groups.items():
    arrays = [jax.tree.leaves(leaf) for leaf in leaves]
    bits = sum(_base.array_bits(x) for group in arrays for x in group)
    values = sum(max(x.size for x in group) for group in arrays)
    per_param = bits / 8 / num_params if num_params else 0.0
    rows.append(Row(field, format, values, bits, per_param))
  return tuple(rows)


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


def _table(header: tuple[str, ...], cells: list[tuple[Any, ...]]) -> str:
  """Aligns text to the left and numbers to the right."""
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
