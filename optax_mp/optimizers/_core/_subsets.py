# SPDX-License-Identifier: Apache-2.0
"""Second moments that many coordinates share: Subset-Norm's and Adam-mini's.

Blocks of a leaf are found by what they have in common, so that the leading axes
of a stack need no mention: a block never reaches over two of its layers.
"""

import functools
import math
from typing import Any, NamedTuple
import warnings

import chex
import jax
import jax.numpy as jnp

from optax_mp.formats import _base
from optax_mp.optimizers._core import _trees

LARGE = 4096  # coordinates of a matrix that has one moment for each


class Blocks(NamedTuple):
  """Which coordinates of a leaf share one second moment.

  ``Blocks()``: none do. ``Blocks((-2,))``: all of a column do, of a Flax kernel
  (in, out) those of an output neuron. ``Blocks((-2,), ((8, 64),))``: of 64
  columns, for queries of 8 heads. ``Blocks((-1,))``: all of a row, or of a
  vector.
  """

  axes: tuple[int, ...] = ()  # negative: whatever differs only along these
  # Pairs (count, size): along the last of the other axes, `count` times `size`
  # neighbours share it, too. None: each stands for itself.
  runs: tuple[tuple[int, int], ...] = ()
  flat: bool = False  # the last two axes are one, row after row


def kept_axes(blocks: Blocks, ndim: int) -> list[int]:
  """The axes along which moments differ, negative, in order."""
  return [i for i in range(-ndim, 0) if i not in blocks.axes]


def check_blocks(blocks: Any, shape: tuple[int, ...], name: str) -> None:
  """Raises a ValueError where blocks do not fit a leaf.

  Args:
    blocks: what a rule has returned.
    shape: of the leaf.
    name: what messages call it.
  """
  if not isinstance(blocks, Blocks):
    raise ValueError(f'`blocks` must return Blocks; got {blocks!r} for {name}.')
  if not all(-len(shape) <= axis < 0 for axis in blocks.axes):
    raise ValueError(
      f'`blocks` must return negative axes of the leaf; got {blocks} for '
      f'{name} of shape {shape}.'
    )
  kept = kept_axes(blocks, len(shape))
  length = shape[kept[-1]] if kept else 1
  if blocks.runs and sum(n * size for n, size in blocks.runs) != length:
    raise ValueError(
      f'`blocks` must return runs that add up to {length}, the length of the '
      f'last axis that is left; got {blocks} for {name} of shape {shape}.'
    )


def zero_moments(p: chex.Array, blocks: Blocks) -> chex.Array:
  """Float32 zeros, one for each block, without axes of length 1."""
  kept = kept_axes(blocks, len(p.shape))
  if not blocks.runs:
    return _trees.zeros_along(p, kept)
  kept = kept[: -2 if blocks.flat else -1]
  return _trees.zeros_along(p, kept, sum(n for n, _ in blocks.runs))


def sums(x: chex.Array, blocks: Blocks) -> chex.Array:
  """The sum over each block, shaped like ``zero_moments``."""
  if blocks.flat:
    x = _trees.sharded_along(x, x, [*_trees.stack_axes(x), None, None])
    x = x.reshape(*x.shape[:-2], -1)
  x = jnp.sum(x, axis=blocks.axes)
  if not blocks.runs:
    return x
  x = _trees.sharded_along(x, x, [*range(x.ndim - 1), None])
  ends = [sum(n * size for n, size in blocks.runs[:i]) for i in _after(blocks)]
  parts = [
    jnp.sum(part.reshape(*part.shape[:-1], n, size), axis=-1)
    for part, (n, size) in zip(
      jnp.split(x, ends, axis=-1), blocks.runs, strict=True
    )
  ]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def means(x: chex.Array, blocks: Blocks) -> chex.Array:
  """The mean over each block."""
  size = max(math.prod(x.shape[axis] for axis in blocks.axes), 1)
  if not blocks.runs:
    return sums(x, blocks) / float(size)
  sizes = [float(size * length) for n, length in blocks.runs for _ in range(n)]
  return sums(x, blocks) / jnp.asarray(sizes, jnp.float32)


def spread(v: chex.Array, blocks: Blocks, like: chex.Array) -> chex.Array:
  """An array that broadcasts against ``like``: for each coordinate its block's.

  Args:
    v: one value for each block.
    blocks: of ``like``.
    like: the gradient.

  Returns:
    The values, axes that are all one block with length 1.
  """
  if blocks.runs:
    ends = [sum(n for n, _ in blocks.runs[:i]) for i in _after(blocks)]
    parts = [
      jnp.repeat(part, size, axis=-1, total_repeat_length=n * size)
      for part, (n, size) in zip(
        jnp.split(v, ends, axis=-1), blocks.runs, strict=True
      )
    ]
    v = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
  if blocks.flat:
    v = v.reshape(like.shape)
    return _trees.sharded_along(v, like, range(like.ndim))
  return jnp.expand_dims(v, blocks.axes)


def _after(blocks):
  return range(1, len(blocks.runs))


def subsets(
  shape: tuple[int, ...], subset_size: Any, square_axis: int
) -> Blocks:
  """Subset-Norm's choice for a leaf.

  Args:
    shape: of the leaf.
    subset_size: ``'heuristic'``, an integer or None, see ``adamw_sn``.
    square_axis: of a square matrix, the axis along which norms differ.

  Returns:
    Blocks.
  """
  matrix = shape[-2:]
  if subset_size is None or not math.prod(shape) or not shape:
    return Blocks()
  if subset_size != 'heuristic':
    size = math.prod(matrix)
    k = subset_length(size, subset_size)
    return Blocks((), ((size // k, k),), flat=len(matrix) > 1)
  if len(matrix) < 2:
    return Blocks()
  m, n = matrix
  rows = square_axis == 0 if m == n else m > n
  return Blocks((-1,) if rows else (-2,))


@functools.cache
def subset_length(size: int, subset_size: int) -> int:
  """The largest divisor of a size up to the wanted one.

  Args:
    size: how many coordinates there are.
    subset_size: how many are wanted in a subset; if negative, the root of
      ``size`` over its absolute value.

  Returns:
    An integer from 1 to ``size``.
  """
  wanted = subset_size
  if subset_size < 0:
    wanted = math.isqrt(size) // -subset_size
  wanted = min(max(wanted, 1), size)
  return next(k for k in range(wanted, 0, -1) if size % k == 0)


def warn_of_single(params: Any, subset_size: Any) -> None:
  """Warns of large leaves whose subsets have one coordinate each."""
  if subset_size in (None, 'heuristic', 1):
    return

  def warn(path, p):
    runs = subsets(p.shape, subset_size, 0).runs
    if runs and runs[0][0] >= LARGE and runs[0][1] == 1:
      warnings.warn(
        f'`subset_size` {subset_size} gives subsets of one coordinate for '
        f'{jax.tree_util.keystr(path)} of shape {p.shape}, whose size has no '
        "smaller divisor: it saves nothing there. Use 'heuristic'.",
        stacklevel=2,
      )

  jax.tree_util.tree_map_with_path(warn, params)


def check_subset_size(subset_size: Any, square_axis: Any) -> None:
  """Raises a ValueError for what is no choice of subsets."""
  _base.check_static(subset_size, 'subset_size')
  _base.check_static(square_axis, 'square_axis')
  is_known = subset_size is None or subset_size == 'heuristic'
  if not is_known and (not _base.is_integer(subset_size) or not subset_size):
    raise ValueError(
      "`subset_size` must be 'heuristic', an integer other than 0, or None for "
      f'a moment a coordinate; got {subset_size!r}.'
    )
  if square_axis not in (0, -1):
    raise ValueError(f'`square_axis` must be 0 or -1; got {square_axis!r}.')
