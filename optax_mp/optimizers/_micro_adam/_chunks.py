# SPDX-License-Identifier: Apache-2.0
"""The rows of an array a few at a time, so that temporaries stay small."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp


def in_chunks(fn: Callable[[Any], Any], rows: Any, limit: int) -> Any:
  """``fn`` of all rows, of so many at once that they have ``limit`` values.

  A chunk is every n-th row, so that chunks of an array that is sharded along
  its first axis have parts on all devices.

  Args:
    fn: of a tuple of trees of arrays (R, ...) to one of the same shapes and
      dtypes, each row by itself, for any R.
    rows: such a tuple, whose arrays are written over, chunk by chunk.
    limit: values of the first array at once; a row at least.

  Returns:
    What ``fn(rows)`` would be.
  """
  first = jax.tree.leaves(rows)[0]
  count = len(first)
  steps = _steps(count, max(1, limit // max(1, first[:1].size)))
  whole = count // steps * steps
  if whole < count:
    parts = (
      jax.tree.map(lambda x: x[:whole], rows),
      jax.tree.map(lambda x: x[whole:], rows),
    )
    parts = in_chunks(fn, parts[0], limit), fn(parts[1])
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
  if steps == 1:
    return fn(rows)

  def body(i, rows):
    chunk = jax.tree.map(
      lambda x: lax.dynamic_index_in_dim(x, i, 1, keepdims=False), rows
    )
    return jax.tree.map(
      lambda x, new: lax.dynamic_update_index_in_dim(x, new, i, 1),
      rows,
      fn(chunk),
    )

  view = jax.tree.map(
    lambda x: jnp.reshape(x, (count // steps, steps, *x.shape[1:])), rows
  )
  view = lax.fori_loop(0, steps, body, view)
  return jax.tree.map(lambda x, like: jnp.reshape(x, like.shape), view, rows)


def in_pairs(fn: Callable[[Any], Any], rows: Any, limit: int) -> Any:
  """:func:`in_chunks` that takes no row without its neighbour.

  Args:
    fn: as there.
    rows: as there.
    limit: values of the first array at once; two rows at least.

  Returns:
    What ``fn(rows)`` would be; a last row without a neighbour comes after all
    others.
  """
  count = len(jax.tree.leaves(rows)[0])
  even = count // 2 * 2
  if not even:
    return fn(rows)

  def paired(rows):  # one axis for both, since TPUs pad the last but one
    return jax.tree.map(lambda x: jnp.reshape(x, (len(x) // 2, -1)), rows)

  def apart(pairs):
    return jax.tree.map(
      lambda x, like: jnp.reshape(x, (-1, *like.shape[1:])), pairs, rows
    )

  whole = paired(jax.tree.map(lambda x: x[:even], rows))
  done = apart(in_chunks(lambda pairs: paired(fn(apart(pairs))), whole, limit))
  if even == count:
    return done
  last = fn(jax.tree.map(lambda x: x[even:], rows))
  return jax.tree.map(lambda *x: jnp.concatenate(x), done, last)


def _steps(count: int, at_once: int) -> int:
  """How many chunks; if possible such that all have as many rows."""
  least = -(-count // at_once)
  even = (n for n in range(least, 2 * least) if count % n == 0)
  return next(even, least)
