# SPDX-License-Identifier: Apache-2.0
"""Hides from a compiler that two arrays are the same.

If two steps begin alike, XLA keeps their common results, in float32, from the
first step to the second. It computes them twice if the inputs seem to differ.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp


def told_apart(tree: Any) -> Any:
  """Copies that a compiler cannot recognise; XLA:CPU does not need them.

  Args:
    tree: any pytree. Typed keys, and leaves that are no arrays, stay the same.

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
