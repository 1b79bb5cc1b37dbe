# SPDX-License-Identifier: Apache-2.0
"""The same array, of which a compiler does not know that it is the same.

Of two steps that begin alike XLA keeps all that they have in common, in
float32, from the first to the second. Told apart, they are computed twice.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp


def told_apart(tree: Any) -> Any:
  """The tree, its arrays told apart; XLA:CPU computes all twice anyway.

  Args:
    tree: what is no array, or an array of typed keys, stays as it is.

  Returns:
    The same values.
  """
  return jax.tree.map(_told_apart, tree)


def _told_apart(x: Any) -> Any:
  if not isinstance(x, jax.Array):
    return x
  if jnp.issubdtype(x.dtype, jax.dtypes.extended):
    return x
  return lax.platform_dependent(
    x, cpu=lambda x: x, default=lax.optimization_barrier
  )
