# SPDX-License-Identifier: Apache-2.0
"""Which values of an array share a scale.

On a TPU a reduction over 128 values of a row costs nothing where rows stay in
tiles of eight: in the view (..., R / 8, 8, C / 128, 128). Seen as (..., R, C /
128, 128) the same blocks cost an optimizer step copies of moments in float32,
as does an array padded to whole blocks. So there is no padding: an array that
the view does not fit has a scale a row.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

_SUBLANES = 8  # rows of a tile
# A scale for fewer values than this weighs more than it helps, and one for more
# than that, of several axes, helps too little.
_SHORT, _LONG = 16, 2**13
_SHORTEST = 4  # with a scale each, values of 8 bits take 16


class Blocks(NamedTuple):
  """Blocks within rows, or whole rows."""

  shape: tuple[int, ...]  # of the array
  view: tuple[int, ...]  # in which groups are whole axes
  axes: tuple[int, ...]  # those axes
  scales: tuple[int, ...]  # the shape of what is kept for each group

  def split(self, x: jax.Array) -> jax.Array:
    """The array, seen so that ``axes`` are the groups."""
    return _reshape(x, self.view, self._cut_spec(x))

  def kept(self, reduced: jax.Array, x: jax.Array) -> jax.Array:
    """What a reduction of the view of x left, in the shape that is stored."""
    return _reshape(reduced, self.scales, _spec(x)[: len(self.scales)])

  def expand(self, scales: jax.Array) -> jax.Array:
    """What is stored for a group, for each of its values.

    All arithmetic is then done in the array's own shape: XLA:GPU computes
    arrays of different shapes in different kernels.
    """
    if self.view == self.shape:
      scales = jnp.expand_dims(scales, self.axes)
      return jnp.broadcast_to(scales, self.shape)
    axes = {axis % len(self.view) for axis in self.axes}
    ones = tuple(1 if i in axes else n for i, n in enumerate(self.view))
    scales_spec = self._cut_spec(scales)
    view = jnp.broadcast_to(_reshape(scales, ones, scales_spec), self.view)
    return _reshape(view, self.shape, _spec(scales))

  def _cut_spec(self, x: jax.Array) -> list[Any]:
    """How the view is sharded, if ``x`` (or its scales) is: at whole blocks."""
    spec = _spec(x)
    if self.view == self.shape:
      return spec
    *leading, last = spec
    if not leading:
      return [last, None]
    *leading, rows = leading
    return [*leading, rows, None, last, None]


def _spec(x: jax.Array) -> list[Any]:
  """The axes of an explicit mesh along which x is known to be sharded."""
  spec = jax.typeof(x).sharding.spec
  return [*spec, *[None] * (x.ndim - len(spec))]


def _reshape(
  x: jax.Array, shape: tuple[int, ...], spec: list[Any]
) -> jax.Array:
  """A reshape; with a word on how it is sharded where JAX asks for one.

  Blocks that the sharding would cut are whole on every device, as are the
  values that they are made of: XLA does the same where axes are automatic.
  """
  if not any(spec):
    return jnp.reshape(x, shape)
  mesh = jax.typeof(x).sharding.mesh
  whole = [_fits(n, axes, mesh) for n, axes in zip(shape, spec, strict=True)]
  cut = [axes if fits else None for axes, fits in zip(spec, whole, strict=True)]
  if not all(whole):
    kept = [axes if axes in cut else None for axes in _spec(x)]
    x = jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*kept)))
  # With the mesh: a spec alone needs a context that not all programs set.
  sharding = NamedSharding(mesh, PartitionSpec(*cut))
  return jnp.reshape(x, shape, out_sharding=sharding)


def _fits(size: int, axes: Any, mesh: Any) -> bool:
  """Whether all devices along some axes of a mesh get as much."""
  axes = (axes,) if isinstance(axes, str) else axes or ()
  return size % math.prod(mesh.shape[axis] for axis in axes) == 0


def cut(shape: tuple[int, ...], block_size: int) -> Blocks:
  """The blocks of an array.

  Args:
    shape: of the array; of the whole one, if it is sharded.
    block_size: values of a block.

  Returns:
    Blocks of ``block_size`` where the last two axes are multiples of (8,
    ``block_size``), or the only axis is one of ``block_size``; their scales
    have the array's rank. Elsewhere rows: the last axis, and as many more of
    the trailing axes as make 16 values, but not if they make more than 2^13 and
    the last has 4; scales have the axes that are left.
  """
  size = shape[-1] if shape else 0
  if size and size % block_size == 0:
    count = size // block_size
    if len(shape) == 1:
      return Blocks(shape, (count, block_size), (-1,), (count,))
    if shape[-2] % _SUBLANES == 0:
      tiles = (shape[-2] // _SUBLANES, _SUBLANES, count, block_size)
      return Blocks(shape, (*shape[:-2], *tiles), (-1,), (*shape[:-1], count))
  row = _row(shape)
  return Blocks(shape, shape, tuple(range(-row, 0)), shape[: len(shape) - row])


def _row(shape: tuple[int, ...]) -> int:
  """How many of the trailing axes have one scale."""
  axes = range(1, len(shape))
  row = next((n for n in axes if math.prod(shape[-n:]) >= _SHORT), len(shape))
  long = row > 1 and math.prod(shape[-row:]) > _LONG
  return 1 if long and shape[-1] >= _SHORTEST else row


def why_rows(shape: tuple[int, ...], block_size: int) -> str:
  """Why :func:`cut` gives whole rows; empty where it gives blocks, or none."""
  if not shape or 0 in shape or cut(shape, block_size).view != shape:
    return ''
  size = math.prod(shape[-_row(shape) :])
  what = (
    'a row' if size == shape[-1] < math.prod(shape) else f'for {size} values'
  )
  if shape[-1] % block_size:
    return f'one scale {what}: {shape[-1]} is no multiple of {block_size}'
  return f'one scale {what}: {shape[-2]} is no multiple of {_SUBLANES}'
