# SPDX-License-Identifier: Apache-2.0
"""Groups of values that share a scale: blocks, or rows and columns at once."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_mp.formats import _base
from optax_mp.formats import _grids
from optax_mp.formats import _reductions


class Rank1(NamedTuple):
  """The scale of a value is the smallest of its row's, column's, ... largest.

  A vector an axis, sum(shape) numbers in all.
  """

  shape: tuple[int, ...]

  def expand(self, scales: tuple[jax.Array, ...]) -> jax.Array:
    """The scale of each value."""
    wide = jnp.full(self.shape, -jnp.inf, jnp.float32)
    for axis, scale in enumerate(scales):
      wide = _smaller(wide, jnp.expand_dims(scale, self.others(axis)))
    return wide

  def others(self, axis: int) -> tuple[int, ...]:
    """All axes but one."""
    return tuple(i for i in range(len(self.shape)) if i != axis)


def _smaller(a: jax.Array, b: jax.Array) -> jax.Array:
  """The scale of the smaller magnitude, with its mark.

  A value that is no number has marked scales along all axes. A huge value has a
  code of its own wherever smaller ones share a scale with it.
  """
  return jnp.where(jnp.abs(a) < jnp.abs(b), a, b)


def fit(grid: _grids.Grid, groups: Any, x: chex.Array) -> Any:
  """What a grid needs to know of each group of values, as it is stored."""
  x = jnp.asarray(x, jnp.float32)
  if isinstance(groups, Rank1):
    axes = range(x.ndim)
    return tuple(grid.fit(x, _reductions.Over(groups.others(a))) for a in axes)
  kept = functools.partial(groups.kept, x=x)
  return grid.fit(x, _reductions.Over(groups.axes, groups.split, kept))


def expand(groups: Any, scales: Any) -> Any:
  """What groups of values share, for each value."""
  if isinstance(groups, Rank1):
    return groups.expand(scales)
  return jax.tree.map(groups.expand, scales)


def check_block_size(block_size: Any) -> None:
  """Raises a ValueError unless ``block_size`` is a positive integer."""
  _base.check_static(block_size, 'block_size')
  if not _base.is_integer(block_size) or block_size < 2:
    raise ValueError(
      f'`block_size` must be an integer, 2 or more; got {block_size!r}. 128 is '
      'the one that costs a TPU no copies.'
    )
