# SPDX-License-Identifier: Apache-2.0
"""The dtype that each parameter shall have."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_mp.formats import _paths

_ARRAYS = (jax.Array, jax.ShapeDtypeStruct, np.ndarray)


def leaf_dtypes(params32: Any, dtype: Any) -> list[Any]:
  """The new dtype of each leaf; leaves that are not floats keep their dtype."""
  leaves, treedef = jax.tree.flatten(params32)
  if jax.tree_util.all_leaves([dtype]):
    wanted = [dtype] * len(leaves)
  else:
    wanted = _paths.flatten_like(treedef, dtype, 'dtype', 'params32')
  return [
    _float_dtype(want) if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
    for x, want in zip(leaves, wanted, strict=True)
  ]


def _float_dtype(want: Any) -> Any:
  """``want``, or its dtype if it is an array; a ValueError for others."""
  known = {jnp.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32)}
  try:
    dtype = want.dtype if isinstance(want, _ARRAYS) else jnp.dtype(want)
  except TypeError:
    dtype = None
  if dtype not in known:
    raise ValueError(
      f'`dtype` must be bfloat16, float16 or float32, or a tree of these or of '
      f'arrays like `params32`; got {want!r}.'
    )
  return dtype
