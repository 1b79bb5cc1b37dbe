# SPDX-License-Identifier: Apache-2.0
"""Rounding to a grid: the one place where a value becomes a code."""

from collections.abc import Callable
import functools
from typing import Any, Protocol, TypeAlias

import chex
import jax
import jax.numpy as jnp

from optax_mp.formats import _ends
from optax_mp.formats import _reductions
from optax_mp.formats import _rounding

Relative: TypeAlias = tuple[jax.Array, jax.Array]


class Grid(Protocol):
  """The values that codes stand for, in the units of a block."""

  @property
  def top(self) -> int:
    """The largest code."""
    ...

  @property
  def even(self) -> bool:
    """Whether noise is to be even over steps."""
    ...

  @property
  def signed(self) -> bool:
    """Whether a code has a sign."""
    ...

  @property
  def infinity(self) -> int:
    """The largest code that is there for each sign."""
    ...

  @property
  def reach(self) -> float:
    """The relative value of ``top``."""
    ...

  def fit(self, x: jax.Array, over: _reductions.Over, /) -> jax.Array:
    """The scale of each block, without the axes of its values.

    In a marked block it is such that no value needs a code above :func:`last`.
    """
    ...

  def scaled(self, x: jax.Array, scale: jax.Array, /) -> Relative:
    """The magnitude of x in the block's units, and whether the block is marked.

    In an array without signs, a huge value is more than ``reach``, and so gets
    its own code. It may be less if the largest usual value of its block is
    nearly as large: then it gets the last code for numbers.
    """
    ...

  def below(self, x: jax.Array, scale: jax.Array, /) -> jax.Array:
    """The largest code whose value is at most the relative x."""
    ...

  def value(self, code: jax.Array, scale: jax.Array, /) -> jax.Array:
    """The relative value of a code, from 0 to ``top + 1``."""
    ...

  def unscaled(self, value: jax.Array, scale: jax.Array, /) -> Relative:
    """The inverse of ``scaled``: the magnitude, and the sign of the mark.

    The second array is negative in a marked block. It may be zero where the
    value is zero: a zero has no code for an infinity, a NaN or a huge value.
    """
    ...


def round_to(
  grid: Grid,
  x: jax.Array,
  scale: jax.Array,
  key: chex.PRNGKey | None,
  keep_nonzero: bool,
  stochastic_below: int | None = None,
) -> jax.Array:
  """The code of each magnitude: one of the two grid points around it.

  Args:
    grid: where codes are.
    x: float32.
    scale: what ``grid.fit`` found, for each value.
    key: for stochastic rounding: up with the probability (x - low) / (high -
      low), so that the mean is x. None for the nearer one.
    keep_nonzero: whether what is not zero may not become the code 0.
    stochastic_below: from this code on the nearer one is taken all the same.

  Returns:
    int32 codes from 0 to ``grid.top``.
  """
  size = x
  nonzero = ~_rounding.is_zero(size)  # it may be, in units of the scale
  x, marked = grid.scaled(size, scale)
  threshold = 0.5
  if key is not None:
    noise = _rounding.random_bits(key, x.shape, even=grid.even)
    threshold = _rounding.uniform(noise)
  code = jnp.clip(grid.below(x, scale), 0, grid.top)
  if stochastic_below is not None:
    threshold = jnp.where(code < stochastic_below, threshold, 0.5)
  low, high = grid.value(code, scale), grid.value(code + 1, scale)
  up = threshold * (high - low) < x - low
  code = jnp.minimum(code + up.astype(jnp.int32), grid.top)
  if keep_nonzero:
    code = jnp.maximum(code, nonzero.astype(jnp.int32))
  return _with_special(grid, code, size, x, marked)


def last(grid: Grid) -> int:
  """The last code that stands for a number in a marked block."""
  return grid.infinity - (2 if grid.signed else 3)


def _with_special(
  grid: Grid,
  code: jax.Array,
  x: jax.Array,
  relative: jax.Array,
  marked: jax.Array,
) -> jax.Array:
  """The codes, with those of a marked block's values that are no numbers.

  Counted down from ``grid.infinity``, the codes stand for infinity, NaN and, in
  arrays without signs, a huge value.

  Args:
    grid: the grid.
    code: the nearest codes.
    x: the values.
    relative: their magnitudes in units of the scale.
    marked: whether their blocks are marked.

  Returns:
    int32 codes.
  """
  end = last(grid)
  below = jnp.minimum(code, end)
  is_nan = x != x
  if not grid.signed:
    below = jnp.where(relative > grid.reach, end + 1, below)
    is_nan |= x <= -_ends.TINY
  code = jnp.where(marked, below, code)
  code = jnp.where(jnp.abs(x) == jnp.inf, grid.infinity, code)
  return jnp.where(is_nan, grid.infinity - 1, code)


def value_of(grid: Grid, code: jax.Array, scale: jax.Array) -> jax.Array:
  """The magnitude of a code."""
  value, sign = grid.unscaled(grid.value(code, scale), scale)
  return special(grid, value, sign, code, _as_it_is)


def _as_it_is(code: int) -> int:
  return code


# Compiled: `jax_debug_nans` would stop at `other`, but looks at results only.
@functools.partial(jax.jit, static_argnames=('grid', 'of_code'), inline=True)
def special(
  grid: Grid,
  value: jax.Array,
  sign: jax.Array,
  code: jax.Array,
  of_code: Callable[[int], Any],
) -> jax.Array:
  """The inverse of :func:`_with_special`.

  Args:
    grid: the grid.
    value: the magnitudes that the codes have in blocks without a mark.
    sign: negative in marked blocks. The scales themselves are not compared:
      XLA:GPU would count one more use of them and keep the moments of small
      leaves in float32.
    code: the codes, or other numbers in the same order.
    of_code: the number in ``code`` that stands for a given code.

  Returns:
    The magnitudes, infinity, NaN or 2^120.
  """
  other = jnp.where(code == of_code(grid.infinity), jnp.inf, jnp.nan)
  if not grid.signed:
    is_huge = code == of_code(grid.infinity - 2)
    other = jnp.where(is_huge, _ends.OUTLIER, other)
  is_other = (code > of_code(last(grid))) & (sign < 0)
  return jnp.where(is_other, other, value)


def times(value: jax.Array, scale: jax.Array) -> Relative:
  """``value * scale``, but a value that is not zero does not underflow to zero.

  Args:
    value: in units of the scale.
    scale: of the block, negative if the block is marked.

  Returns:
    The magnitude, and a number that is negative in a marked block.
  """
  product = value * scale
  least = jnp.minimum(jnp.abs(scale), _ends.TINY)  # it is 0 where all are
  size = jnp.abs(product)
  return jnp.where(value > 0, jnp.maximum(size, least), size), product
