# SPDX-License-Identifier: Apache-2.0
"""MicroAdam's step: the last gradients, sparse, and the error of that.

A leaf is rows of blocks. Each block has a window of its largest entries at each
of the last steps, and in a format what was never large enough.
"""

import functools
import math
from typing import Any, NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp

from optax_mp import formats
from optax_mp._core import _derivatives
from optax_mp.formats import _base
from optax_mp.formats import _names
from optax_mp.optimizers._core import _checks
from optax_mp.optimizers._core import _trees
from optax_mp.optimizers._micro_adam import _chunks
from optax_mp.optimizers._micro_adam import _window

# Values at once: what a step needs beside a leaf is some 40 bytes for each.
_AT_ONCE = 2**19


class Group(NamedTuple):
  """Blocks of one length."""

  lead: tuple[int, ...]  # how many, as an axis, if it is not one
  length: int
  kept: int  # entries of a block that are kept


class Method(NamedTuple):
  """MicroAdam's settings that fix shapes."""

  window: int
  density: float
  block_size: int
  residual: formats.Format
  values_dtype: str
  layout: str
  alpha: float

  def check(self) -> None:
    """Raises a ValueError for what cannot be."""
    _checks.whole(window=self.window, block_size=self.block_size)
    if self.block_size >= 2**15:
      raise ValueError(
        '`block_size` must be below 2^15, for indices are int16; got '
        f'{self.block_size}.'
      )
    _base.check_static(self.density, 'density')
    if not 0 < self.density <= 1:
      raise ValueError(
        f'`density` must be larger than 0 and at most 1; got {self.density!r}.'
      )
    _base.check_static(self.alpha, 'alpha')
    if not 0 <= self.alpha < 1:
      raise ValueError(
        f'`alpha` must be from 0 to 1, without 1; got {self.alpha!r}.'
      )
    _checks.one_of(('bfloat16', 'float32'), values_dtype=self.values_dtype)
    _checks.one_of(('flat', 'last_axis'), layout=self.layout)
    _base.check_format(self.residual, 'residual')
    signed = getattr(self.residual, 'signed', True)
    if not signed or _is_noisy(self.residual):
      raise ValueError(
        '`residual` must be a format with signs, as errors have them, and '
        f'without noise; got {self.residual}.'
      )

  def stack(self, shape: tuple[int, ...]) -> int:
    """How many of a leaf's axes come before those that are cut to blocks."""
    return max(0, len(shape) - (2 if self.layout == 'flat' else 1))

  def groups(self, shape: tuple[int, ...]) -> list[Group | None]:
    """Whole blocks and the last, shorter one, if there is one."""
    size = math.prod(shape[self.stack(shape) :])
    length = min(self.block_size, size)
    if not math.prod(shape):
      return [None, None]

    def group(lead, length):
      return Group(lead, length, math.ceil(length * self.density))

    count = size // length
    rest = size - count * length
    whole = group((count,) if count > 1 else (), length)
    return [whole, group((), rest) if rest else None]

  def init(self, p: chex.Array, field: int) -> Any:
    """One of six fields: indices, values, residuals; of both groups."""
    group = self.groups(p.shape)[field // 3]
    if group is None:
      return _trees.NOTHING
    lead = p.shape[: self.stack(p.shape)] + group.lead

    def filled(x):
      shape = lead + x.shape
      axes = self._axes(p, shape)
      known = [i for i in axes if i is not None]
      zeros = _trees.zeros_along(p, known, *shape[len(known) :])
      return zeros.astype(x.dtype) + x  # sharded like the parameter

    return jax.tree.map(filled, self._blank(group)[field % 3])

  def axes(self, p: chex.Array, state: Any) -> list[tuple[int | None, ...]]:
    """For each array of a leaf's state the parameter's axes."""
    return [self._axes(p, x.shape) for x in jax.tree.leaves(state)]

  def _axes(self, p, shape):
    if shape == p.shape:
      return tuple(range(p.ndim))
    stack = self.stack(p.shape)
    return *range(stack), *[None] * (len(shape) - stack)

  def update(
    self,
    g: chex.Array,
    state: Any,
    moments: _window.Moments,
    shape: tuple[int, ...],
    at_once: int = _AT_ONCE,
  ) -> tuple[chex.Array, ...]:
    """The step of a leaf; then all arrays of its state."""
    if self.stack(shape) > 1:  # merged, they could not be sharded apart
      inner = functools.partial(
        self.update, shape=shape[1:], at_once=at_once // shape[0]
      )
      return jax.vmap(inner, (0, 0, None))(g, state, moments)
    rows = jnp.reshape(g, (math.prod(shape[: self.stack(shape)]), -1))
    steps, fields, start = [], [], 0
    for i, group in enumerate(self.groups(shape)):
      parts = state[3 * i : 3 * i + 3]
      if group is None:
        fields.append(parts)
        continue
      size = math.prod(group.lead) * group.length
      x = rows[:, start : start + size]
      start += size
      x, new = self._of_group(x, parts, group, moments, at_once)
      steps.append(x)
      fields.append(new)
    u = jnp.concatenate(steps, 1) if len(steps) > 1 else steps[0]
    return jnp.reshape(u, shape), *jax.tree.leaves(fields)

  def _of_group(self, x, parts, group, moments, at_once):
    """The same of all blocks of one length."""
    count = x.size // group.length
    rows = jax.tree.map(
      lambda part, one: jnp.reshape(part, (count, *one.shape)),
      tuple(parts),
      self._blank(group),
    )

    def step(rows):
      x, indices, values, residual = rows
      return self._step(x, indices, values, residual, moments, group)

    rows = jnp.reshape(x, (count, group.length)), *rows
    # Rows of an odd number of 4-bit codes share bytes, two of them do not.
    run = _chunks.in_chunks if group.length % 2 == 0 else _chunks.in_pairs
    u, *new = run(step, rows, at_once)
    new = jax.tree.map(
      lambda y, like: jnp.reshape(y, like.shape), tuple(new), tuple(parts)
    )
    return jnp.reshape(u, x.shape), new

  def stored(self) -> Any:
    """What a residual is kept in: Flax NNX makes mappings of it."""
    return jax.eval_shape(self._encode, jnp.zeros(2))

  def _blank(self, group: Group) -> tuple[Any, Any, Any]:
    """What a block has before the first step. Indices of a gradient differ."""
    indices = jnp.tile(jnp.arange(group.kept, dtype=jnp.int16), self.window)
    values = jnp.zeros(indices.shape, self.values_dtype)
    return indices, values, self._encode(jnp.zeros(group.length))

  def _encode(self, x: jax.Array) -> Any:
    """One block of errors, under the name of its format."""
    return _names.named(self.residual, self.residual.encode(x))

  def _decode(self, kept: Any, like: jax.ShapeDtypeStruct) -> Any:
    return self.residual.decode(_names.nameless(kept), like)

  def _step(self, x, indices, values, residual, moments, group):
    """Of blocks (R, length)."""
    like = jax.ShapeDtypeStruct((group.length,), jnp.float32)
    encode = jax.vmap(self._encode)
    decode = jax.vmap(lambda kept: self._decode(kept, like))
    x = x + decode(residual)
    top = lax.top_k(jnp.abs(x), group.kept)[1]
    chosen = jnp.take_along_axis(x, top, 1)
    indices = _window.written(indices, top, moments)
    values = _window.written(values, chosen, moments)
    residual = encode(_derivatives.refused(_window.zeroed(x, top)))
    u = _window.normalized(x.shape, indices, values, moments)
    if self.alpha:
      error = decode(residual)
      u += self.alpha * error
      residual = encode((1 - self.alpha) * error)
    return u, indices, values, residual


def _is_noisy(format: Any) -> bool:
  """Whether it, or a format that it is made of, rounds stochastically."""
  if getattr(format, 'rounding', 'nearest') != 'nearest':
    return True
  fields = vars(format).values() if hasattr(format, '__dict__') else ()
  return any(_is_noisy(x) for x in fields if isinstance(x, formats.Format))
