# SPDX-License-Identifier: Apache-2.0
"""A few rows of each matrix, or columns: which, and there and back.

A choice is indices (..., r) along one axis and a factor each, rho. With rows
drawn independently with probabilities q, rho = (r q)^(-1/2) makes the projector
P, back and forth, the identity on average.
"""

import functools
from typing import Any, Literal, NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp

from optax_mp.formats import _base
from optax_mp.optimizers._core import _bases
from optax_mp.optimizers._core import _checks
from optax_mp.optimizers._core import _mesh
from optax_mp.optimizers._core import _projection
from optax_mp.optimizers._core import _trees

Rule = Literal['topk', 'multinomial_norm', 'uniform']
RULES = ('topk', 'multinomial_norm', 'uniform')


class Rows(NamedTuple):
  """How they are chosen: from the gradient, or drawn."""

  rank: int  # how many; at most the length of the axis
  axis: int | None  # -2, -1, or None: the longer one, of equal ones -2
  rule: Rule
  replacement: bool  # whether one may be drawn twice

  def check(self) -> None:
    """Raises a ValueError for what cannot be."""
    _checks.whole(rank=self.rank)
    _checks.one_of((None, -2, -1), axis=self.axis)
    _checks.one_of(RULES, rule=self.rule)
    _base.check_static(self.replacement, 'replacement')
    if self.replacement and self.rule == 'topk':
      raise ValueError(
        "`replacement` is for rules that draw; got True with rule='topk', all "
        'of whose rows differ. Leave it out, or choose another rule.'
      )

  def along(self, p: chex.Array) -> int:
    """The axis of a leaf."""
    return _projection.long_axis(p.shape) if self.axis is None else self.axis

  def zeros(self, tree: Any) -> Any:
    """Rows that are zero: (..., r, n), columns (..., m, r)."""

    def one(p):
      axis = self.along(p)
      kept = [*_trees.stack_axes(p), p.ndim - 3 - axis]
      rows = _trees.zeros_along(p, kept, min(self.rank, p.shape[axis]))
      return jnp.swapaxes(rows, -1, -2) if axis == -2 else rows

    return of_matrices(one, tree)

  def factors(self, tree: Any) -> Any:
    """Zeros for each row: (..., r)."""

    def one(p):
      r = min(self.rank, p.shape[self.along(p)])
      return _trees.zeros_along(p, _trees.stack_axes(p), r)

    return of_matrices(one, tree)

  def choose(self, updates: Any, keys: Any) -> tuple[Any, Any]:
    """Trees of indices and of rho, with a key a leaf."""

    def one(g, key):
      axis = self.along(g)
      own = functools.partial(
        choose,
        rank=self.rank,
        axis=axis,
        rule=self.rule,
        replacement=self.replacement,
      )
      axes = (*_trees.stack_axes(g), None)
      return _mesh.automatic(own, g, key, like=g, axes=[axes, axes])

    pairs = of_matrices(one, updates, keys)
    indices = of_matrices(lambda _, pair: pair[0], updates, pairs)
    return indices, of_matrices(lambda _, pair: pair[1], updates, pairs)

  def select(self, tree: Any, indices: Any, rho: Any = None) -> Any:
    """Rows of a tree, multiplied by rho if it is given."""

    def one(g, indices):
      axis = self.along(g)
      own = functools.partial(_projection.select, axis=axis)
      axes = [None if i == g.ndim + axis else i for i in range(g.ndim)]
      return _mesh.automatic(own, g, indices, like=g, axes=tuple(axes))

    x = of_matrices(one, tree, indices)
    return x if rho is None else self._scaled(tree, x, rho)

  def back(self, x: Any, like: Any, indices: Any, rho: Any) -> Any:
    """Matrices with rows x rho, those with equal indices added, else zero."""

    def one(g, x, indices):
      own = functools.partial(
        _projection.scatter, axis=self.along(g), shape=g.shape
      )
      axes = tuple(range(g.ndim))
      return _mesh.automatic(own, x, indices, like=g, axes=axes)

    return of_matrices(one, like, self._scaled(like, x, rho), indices)

  def _scaled(self, like: Any, x: Any, rho: Any) -> Any:
    def one(g, x, rho):
      return x * jnp.expand_dims(rho, -1 if self.along(g) == -2 else -2)

    return of_matrices(one, like, x, rho)


def of_matrices(fn: Any, tree: Any, *others: Any) -> Any:
  """``fn`` of matrices, and of what other trees have there; else NOTHING."""
  return jax.tree.map(
    lambda p, *parts: (
      fn(p, *parts) if _bases.is_projected(p) else _trees.NOTHING
    ),
    tree,
    *others,
  )


def others_of(tree: Any) -> Any:
  """The leaves that are no matrices, ``NOTHING`` for those that are."""
  return jax.tree.map(
    lambda p: _trees.NOTHING if _bases.is_projected(p) else p, tree
  )


def merged(like: Any, matrices: Any, others: Any) -> Any:
  """One tree of the two."""
  return jax.tree.map(
    lambda p, matrix, other: matrix if _bases.is_projected(p) else other,
    like,
    matrices,
    others,
  )


def choose(
  g: chex.Array,
  key: chex.PRNGKey,
  rank: int,
  axis: int,
  rule: Rule,
  replacement: bool,
) -> tuple[chex.Array, chex.Array]:
  """A choice for each matrix of a stack.

  Args:
    g: gradients (..., m, n).
    key: for a draw.
    rank: how many; at most the length of the axis.
    axis: -2 for rows, -1 for columns.
    rule: ``'topk'``: of largest norm, of equal ones the first; or drawn with
      probabilities in proportion to norms, all equal where all norms are 0; or
      with equal ones.
    replacement: whether each is drawn from all; else all differ.

  Returns:
    indices (..., r), int32, and rho (..., r), float32.
  """
  length = g.shape[axis]
  r = min(rank, length)
  if rule == 'topk':
    indices = _projection.top_indices(g, rank, axis)
  else:
    q = probabilities(g, axis, rule)
    noise_shape = (*q.shape[:-1], r, length) if replacement else q.shape
    noise = jnp.log(q)[..., None, :] if replacement else jnp.log(q)
    noise += jax.random.gumbel(key, noise_shape, jnp.float32)
    if replacement:
      indices = jnp.argmax(noise, -1).astype(jnp.int32)
      drawn = jnp.take_along_axis(q, indices, -1)
      return indices, lax.rsqrt(r * drawn)
    # A row of zeros, which has -inf, is drawn when there are no others left.
    indices = lax.top_k(noise, r)[1]
  return indices, jnp.ones(indices.shape, jnp.float32)


def probabilities(g: chex.Array, axis: int, rule: Rule) -> chex.Array:
  """Of each row or column to be drawn, (..., m) or (..., n)."""
  norms = _projection.norms(g, axis)
  total = jnp.sum(norms, -1, keepdims=True)
  equal = (total == 0) | (rule == 'uniform')
  return jnp.where(
    equal, 1 / g.shape[axis], norms / jnp.where(equal, 1.0, total)
  )
