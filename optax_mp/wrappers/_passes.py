# SPDX-License-Identifier: Apache-2.0
"""The two passes of a step: what blocks share first, then their codes."""

from collections.abc import Callable
from typing import Any

import jax

from optax_mp._core import _barriers
from optax_mp.formats import _fitted
from optax_mp.formats import _tree


def fit_ahead(
  advance: Callable[[Any], tuple[Any, Any]],
  stored: Any,
  like: Any,
  chosen: list[Any],
) -> list[Any] | None:
  """What formats need to know of a state that is not there yet.

  Args:
    advance: of a stored state, updates and the new state in float32.
    stored: the state.
    like: its shapes and dtypes in float32.
    chosen: the format of each leaf.

  Returns:
    The scales of each leaf; None if no format has any.
  """
  if not any(_fitted.is_fitted(format) for format in chosen):
    return None
  _, ahead = advance(_recomputed(stored, like))
  return _tree.fit_leaves(ahead, chosen)


def _recomputed(stored: Any, like: Any) -> Any:
  """The same state, of which XLA does not know that it is the same.

  Else XLA:GPU would compute new moments once, for both the scales and the
  codes, and keep them in between. Of what is stored only the arrays of a leaf's
  shape are told apart: that is enough, and scales have copies on a TPU. XLA:CPU
  computes them for each of its results anyway.
  """

  def told_apart(leaf, parts):
    return jax.tree.map(
      lambda x: _barriers.told_apart(x) if x.shape == leaf.shape else x, parts
    )

  leaves, treedef = jax.tree.flatten(like)
  found = _tree.flatten_state(treedef, stored)
  return treedef.unflatten(map(told_apart, leaves, found))
