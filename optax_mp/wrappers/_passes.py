# SPDX-License-Identifier: Apache-2.0
"""The two passes of a step: first the scales of blocks, then their codes."""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax

from optax_mp._core import _barriers
from optax_mp.formats import _factored
from optax_mp.formats import _fitted
from optax_mp.formats import _paths
from optax_mp.formats import _reductions
from optax_mp.formats import _tree


class FirstPass(NamedTuple):
  """A step without its updates and codes."""

  stored: Any  # the old state, which XLA cannot merge with the second pass's
  inner_state: Any  # the state after, in float32
  scales: list[Any]  # of each leaf


def fit_ahead(
  advance: Callable[[Any], tuple[Any, Any]],
  stored: Any,
  like: Any,
  chosen: list[Any],
  params: Any,
) -> FirstPass | None:
  """The first pass: the scales of the new state, without its codes.

  Args:
    advance: maps a stored state to updates and the new state in float32.
    stored: the state.
    like: its shapes and dtypes in float32.
    chosen: the format of each leaf.
    params: a tree of the structure of the parameters.

  Returns:
    The first pass; None if no format has scales.
  """
  if not any(_fitted.is_fitted(format) for format in chosen):
    return None
  again = _recomputed(stored, like)
  _, ahead = advance(again)
  scales = _together(_tree.fit_leaves(ahead, chosen), like, chosen, params)
  return FirstPass(again, ahead, scales)


def _together(
  scales: list[Any], like: Any, chosen: list[Any], params: Any
) -> list[Any]:
  """The same scales; on a GPU, all scales of a parameter form one group.

  Otherwise XLA:GPU may fuse the codes of one moment with the scales of another
  one: three kernels then read the gradient. Factored leaves and small leaves
  are left out: XLA computes their scales in other kernels anyway.
  """
  leaves = jax.tree_util.tree_leaves_with_path(like)
  paths = [path for path, _ in leaves]
  whose = _paths.split_paths(paths, _paths.param_paths(params))
  groups = collections.defaultdict(list)
  for i, (path, leaf) in enumerate(leaves):
    tied = not isinstance(chosen[i], _factored.Factored)
    if scales[i] is not None and tied and leaf.size >= _reductions.FEW:
      groups[whose[path][1]].append(i)
  scales = list(scales)
  for group in groups.values():
    if len(group) > 1:
      tied = _gpu_barrier([scales[i] for i in group])
      for i, scale in zip(group, tied, strict=True):
        scales[i] = scale
  return scales


def _recomputed(stored: Any, like: Any) -> Any:
  """The same state, behind a barrier: XLA cannot merge the two.

  Otherwise XLA:GPU would compute new moments once, for both scales and codes,
  and keep them in float32. Only arrays of the shape of their leaf get a
  barrier: that is enough, and a TPU would copy scales. XLA:CPU computes new
  moments for each of its results anyway.
  """

  def told_apart(leaf, parts):
    return jax.tree.map(
      lambda x: _barriers.told_apart(x) if x.shape == leaf.shape else x, parts
    )

  leaves, treedef = jax.tree.flatten(like)
  found = _tree.flatten_state(treedef, stored)
  return treedef.unflatten(map(told_apart, leaves, found))


def _gpu_barrier(x: Any) -> Any:
  return lax.platform_dependent(
    x, cpu=lambda x: x, tpu=lambda x: x, default=lax.optimization_barrier
  )
