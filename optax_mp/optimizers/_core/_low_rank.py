# SPDX-License-Identifier: Apache-2.0
"""Adam along a few directions: what GaLore, Fira and APOLLO share.

The moments stay what they are when the basis is made anew. The papers differ in
the rule that makes a step of the whole matrix of the one in the subspace.
"""

import functools
from typing import Any, Protocol

import chex
from jax import lax
import jax.numpy as jnp
import optax

from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _bases
from optax_mp.optimizers._core import _checks
from optax_mp.optimizers._core import _groups
from optax_mp.optimizers._core import _projection
from optax_mp.optimizers._core import _trees

Betas = tuple[chex.Numeric, chex.Numeric, chex.Numeric]


class Rule(Protocol):
  """What a paper makes of Adam's step in the subspace."""

  def __call__(
    self,
    g: chex.Array,
    x: chex.Array,
    n: chex.Array,
    basis: chex.Array,
    norm: Any,
  ) -> tuple[chex.Array, Any]:
    """Returns the step of the whole, and the norm to store.

    Args:
      g: the gradient.
      x: its projection.
      n: Adam's step of x before bias is corrected, see ``_adam.normalized``.
      basis: P.
      norm: the stored one.
    """
    ...


def scale_by(
  state_type: Any,
  rule: Rule,
  rank: int,
  gap: int,
  adam: Betas,
  projector: _bases.Projector,
  *,
  known: tuple[str, ...] = ('svd',),
  stored: bool = True,
  limited: bool = True,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """The transformation of a paper.

  Args:
    state_type: a NamedTuple with fields ``count``, ``rng_key``, ``mu``, ``nu``,
      ``projector`` and, if there are any, ``norm``.
    rule: of leaves with two or more axes; others have Adam.
    rank: of the subspace.
    gap: steps that a projector lasts.
    adam: b1, b2 and eps, in the form of ``_adam.adam_form``.
    projector: makes projectors.
    known: names of those that make some.
    stored: or the projector is made again each step.
    limited: whether there are norms.
    seed: of what is drawn.

  Returns:
    The transformation.

  Raises:
    ValueError: for hyperparameters that cannot be.
  """
  b1, b2, eps = adam
  _checks.whole(rank=rank, gap=gap)
  _checks.decays(b1=b1, b2=b2)
  _checks.positive(eps=eps)
  _bases.check_projector(projector, known)
  is_drawn = projector != 'svd'

  def init_fn(params):
    none = _bases.nothing(params)
    fields = {
      'count': jnp.zeros((), jnp.int32),
      'rng_key': _trees.raw_key(seed) if is_drawn else _trees.NOTHING,
      'mu': _bases.zero_moments(params, rank),
      'nu': _bases.zero_moments(params, rank),
      'projector': _bases.zero_bases(params, rank) if stored else none,
      'norm': _bases.zero_norms(params) if limited else none,
    }
    return state_type(**{name: fields[name] for name in state_type._fields})

  def leaf(due, bias, g, mu, nu, old, norm, key):
    if not _bases.is_projected(g):
      n, mu, nu = _adam.normalized(g, mu, nu, *adam)
      return bias * n, mu, nu, old, norm

    def make():
      return _bases.made(projector, g, rank, key)

    basis = _bases.refreshed(due, make, old, g) if stored else make()
    x = _projection.project(g, basis)
    n, mu, nu = _adam.normalized(x, mu, nu, *adam)
    u, norm = rule(g, x, n, basis, norm)
    return bias * u, mu, nu, basis if stored else old, norm

  def update_fn(updates, state, params=None, **extra_args):
    del params
    old, keys = state._asdict(), None
    if is_drawn:
      index = lax.div(state.count, jnp.int32(gap))
      layer = extra_args.get('layer')
      keys = _trees.leaf_keys(updates, state.rng_key, index, layer)
    count = _trees.increment(state.count)
    due = _trees.refreshes(state.count, gap)
    step = functools.partial(leaf, due, _adam.bias(count, b1, b2))
    names = 'mu', 'nu', 'projector', 'norm'
    none = _bases.nothing(updates)
    trees = [old.get(name, none) for name in names]
    updates, *trees = _trees.map_leaves(step, updates, trees, keys)
    new = {**dict(zip(names, trees, strict=True)), 'count': count}
    return updates, state._replace(**{k: new[k] for k in new if k in old})

  return _trees.in_float32(
    optax.GradientTransformationExtraArgs(init_fn, update_fn)
  )


def ratios(
  n: chex.Array, x: chex.Array, shape: tuple[int, ...], each: bool = True
) -> chex.Array:
  r"""How much Adam scales what a gradient has along the directions.

  .. math::
    f = \|N\| / (\|x\| + 10^{-8})

  Args:
    n: N, Adam's step of x without correction of bias.
    x: what was projected.
    shape: of the gradient.
    each: a factor for each row of a tall matrix, or column of a wide one; else
      one for a matrix.

  Returns:
    An array that broadcasts with the gradient.
  """
  axis = _projection.rank_axis(shape) if each else (-2, -1)

  def norm(x):
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True))

  return norm(n) / (norm(x) + 1e-8)


def alias(
  method: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  adam: Betas,
  weight_decay: Any,
  mask: _adam.Mask,
  matrices: _groups.Matrices,
  adam_learning_rate: optax.ScalarOrSchedule | None,
) -> optax.GradientTransformationExtraArgs:
  """A whole optimizer, as the official codes have it.

  Args:
    method: for ``matrices``.
    learning_rate: of those.
    adam: b1, b2 and eps for other leaves.
    weight_decay: of weights after the step, for all leaves.
    mask: what to decay.
    matrices: a tree of bools, a function or None.
    adam_learning_rate: of other leaves, or None.

  Returns:
    A transformation.
  """
  return _groups.with_rates(
    method,
    _adam.scale_by_adam(*adam, eps_first=True),
    _adam.decay_after_step,
    (learning_rate, adam_learning_rate),
    (weight_decay, mask),
    matrices,
  )
