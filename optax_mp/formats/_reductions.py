# SPDX-License-Identifier: Apache-2.0
"""Reductions over the values that share a scale, of words of float32.

Floats are compared as integers: XLA:CPU's maximum of floats may pass over a
NaN, and integers have an order in which values of another kind find a place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

# Values of a leaf. With one reduction in place of two, XLA:GPU reads more for a
# smaller leaf (on an H100); with two, it keeps the new moment of a larger leaf
# in float32 between them (on an A100).
FEW = 768 * 768


def _as_it_is(x: jax.Array) -> jax.Array:
  return x


class Over(NamedTuple):
  """Which values of an array share a scale: a reduction of the array."""

  axes: tuple[int, ...]  # of the split array, to be reduced
  split: Callable[[jax.Array], jax.Array] = _as_it_is  # into blocks
  # Gives the reduced array its stored shape. This comes right after each
  # reduction: XLA:TPU would copy every array that the scales are computed from.
  kept: Callable[[jax.Array], jax.Array] = _as_it_is


def by_size(x: jax.Array, one: Any, two: Any, tpu: Any) -> Any:
  """``one`` for large arrays on a GPU, ``two`` for others and on CPUs.

  XLA:GPU recomputes an operand for each of two reductions, and for each shape
  in which it is read. If its cost model finds this too expensive, XLA
  materializes the operand in float32.

  Args:
    x: the array.
    one: a function of it that has one reduction.
    two: a function with two ordinary reductions (min, max).
    tpu: ``one`` or ``two``, for TPUs.

  Returns:
    The result of the function that was chosen.
  """
  gpu = one if x.size >= FEW else two
  return lax.platform_dependent(x, cpu=two, tpu=tpu, default=gpu)


def words(x: jax.Array) -> jax.Array:
  """The words of float32, int32."""
  return lax.bitcast_convert_type(x, jnp.int32)


def as_float(words: jax.Array) -> jax.Array:
  """The float32 of words."""
  return lax.bitcast_convert_type(words, jnp.float32)


def reduce(
  pairwise: Callable[[jax.Array, jax.Array], jax.Array],
  start: np.int32,
  x: jax.Array,
  over: Over,
) -> jax.Array:
  """Reduces an array that is split already, on a CPU by halves.

  XLA:CPU takes the numbers of the last axis one at a time, but compares two
  halves of it many numbers at a time.
  """

  def at_once(x):
    axes = tuple(axis % x.ndim for axis in over.axes)
    return over.kept(lax.reduce(x, start, pairwise, axes))

  def by_halves(x):
    # The last few are left to a reduction: XLA:CPU would repeat the halving for
    # each number that needs the scale, but does not repeat a reduction.
    while over.axes == (-1,) and x.shape[-1] and x.shape[-1] % 16 == 0:
      half = x.shape[-1] // 2
      x = pairwise(x[..., :half], x[..., half:])
    return at_once(x)

  return lax.platform_dependent(x, cpu=by_halves, default=at_once)


def reduce_own(
  pairwise: Callable[[jax.Array, jax.Array], jax.Array],
  start: Any,
  x: jax.Array,
  over: Over,
) -> jax.Array:
  """Reduces a split array with a function of one's own.

  If the values that share a scale lie on several devices, XLA turns the
  reduction into an all-reduce. CPUs and GPUs support all-reduces of sums,
  products, maxima and minima only. For a reduction of two operands, XLA gathers
  the partial results of all devices instead, and each device reduces them.
  Except on a TPU, a second operand is therefore added. All its values are
  false, which XLA cannot know.

  Args:
    pairwise: a function of two values, associative and commutative.
    start: its identity.
    x: the array.
    over: which values share a scale.

  Returns:
    The reduced array, in its stored shape.
  """
  axes = tuple(axis % x.ndim for axis in over.axes)

  def alone(x):
    return over.kept(lax.reduce(x, start, pairwise, axes))

  def beside_another(x):
    unknown = lax.optimization_barrier(jnp.zeros((), bool))
    operands = x, jnp.broadcast_to(unknown, x.shape)
    starts = start, np.bool_(False)

    def of_both(a, b):
      return pairwise(a[0], b[0]), a[1] | b[1]

    x, unknown = lax.reduce(operands, starts, of_both, axes)
    # The second result is used, so that XLA cannot remove its operand.
    return over.kept(jnp.where(unknown, start, x))

  return lax.platform_dependent(x, tpu=alone, default=beside_another)
