# SPDX-License-Identifier: Apache-2.0
"""The bytes of parameters, state and gradients, counted from shapes alone."""

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_mp import formats
from optax_mp.formats import _base
from optax_mp.formats import _paths
from optax_mp.memory import _table


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
    return _table.table(header, cells)


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
