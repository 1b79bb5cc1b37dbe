# SPDX-License-Identifier: Apache-2.0
"""Casts parameters to 16 bits before training."""

import re
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_mp._core import _patterns
from optax_mp.formats import _base
from optax_mp.formats import _paths


def cast(
  params: optax.Params,
  dtype: Any = jnp.bfloat16,
  keep_float32: str | re.Pattern[str] | None = None,
) -> optax.Params:
  """Casts parameters to bfloat16, or to another float dtype, for training.

  Call it once, after the model is initialized and before the optimizer is:
  ``params = cast(params)``, then ``state = tx.init(params)``.

  Args:
    params: any pytree of arrays or of ``jax.ShapeDtypeStruct``: dicts, an
      ``nnx.State``, Flax's boxes, an Equinox module or a Haiku tree.
    dtype: a float dtype of 16 bits or more: bfloat16, float16 for GPUs that
      have no bfloat16, float32 to go back.
    keep_float32: a regular expression such as ``'norm|bias|embed'``. Parameters
      keep their dtype if it is found in their path (``'layer/kernel'``).

  Returns:
    The same tree, with its boxes, Variables and their metadata. Integers,
    bools, typed keys, complex numbers, None, Python numbers, functions, floats
    of 8 bits and less, and arrays that a format stored are not changed.

  Raises:
    ValueError: if ``dtype`` is not a float of 16 bits or more, or if
      ``keep_float32`` is not a regular expression.

  Warns:
    UserWarning: if ``keep_float32`` is found in no path.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_mp
    >>> params = {'norm': jnp.ones(4), 'kernel': jnp.ones((4, 4))}
    >>> half = optax_mp.cast(params, keep_float32='norm')
    >>> jax.tree.map(lambda x: str(x.dtype), half)
    {'kernel': 'bfloat16', 'norm': 'float32'}

  **Caveats:** the cast rounds. To start from float32 weights without that loss,
  take ``checkpoint.from_float32``: its state keeps the rounding errors.
  """
  dtype = _checked(dtype)
  kept = _patterns.compiled(keep_float32)
  names: list[str] = []

  def one(path, x):
    if not _is_wide_float(x):
      return x
    # Variables and boxes of Flax add an attribute to the path; it is left out.
    names.append(_paths.path_str(path, in_variables=True))
    return x if kept and kept.search(names[-1]) else _cast(x, dtype)

  new = jax.tree_util.tree_map_with_path(one, params, is_leaf=_base.is_stored)
  if kept and names and not any(map(kept.search, names)):
    warnings.warn(
      '`keep_float32` keeps nothing: it is found in no path of a parameter; '
      f'got {kept.pattern!r} and parameters such as {sorted(names)[:3]}. Leave '
      'it out where no parameter is to stay float32.',
      stacklevel=2,
    )
  return new


def _checked(dtype: Any) -> Any:
  try:  # NumPy takes None for float64; here it is refused
    found = None if dtype is None else jax.dtypes.canonicalize_dtype(dtype)
  except TypeError:
    found = None
  wide = found is not None and jnp.issubdtype(found, jnp.floating)
  if found is None or not wide or _base.dtype_bits(found) < 16:
    raise ValueError(
      '`dtype` must be a float of 16 bits or more, such as `jnp.bfloat16`; got '
      f'{dtype!r}. For fewer bits see `formats.encode_tree`.'
    )
  return found


def _is_wide_float(x: Any) -> bool:
  if not isinstance(x, (jax.Array, jax.ShapeDtypeStruct, np.ndarray)):
    return False
  is_float = jnp.issubdtype(x.dtype, jnp.floating)
  return is_float and _base.dtype_bits(x.dtype) >= 16


def _cast(x: Any, dtype: Any) -> Any:
  if isinstance(x, jax.ShapeDtypeStruct):
    return x.update(dtype=dtype)
  return x.astype(dtype)
