# SPDX-License-Identifier: Apache-2.0
"""States as flat dictionaries of NumPy arrays, for any file format."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_mp._core import _boxes
from optax_mp.checkpoint import _flat
from optax_mp.checkpoint import _rebuild

# Separates an array's name from its dtype, if NumPy does not have that dtype.
_MARK = ':'
_KEY = 'key_'  # marks typed keys; the name of their implementation follows


def to_arrays(state: Any) -> dict[str, np.ndarray]:
  """Turns a state into NumPy arrays with names, for ``numpy.savez`` and others.

  Take it for a file format, such as safetensors, that knows neither pytrees nor
  dtypes such as int4, bfloat16 and fp8. Reading the file needs no pickle.

  Args:
    state: any state, or parameters, with arrays that this process can read.

  Returns:
    Arrays by name, such as ``'0/mu/w/codes'``. If NumPy does not have an
    array's dtype, it is viewed as unsigned integers of the same width (int4: as
    bytes), and its name ends with the dtype: ``'0/mu/w/codes:int4'``.

  Examples:
    >>> import jax.numpy as jnp, optax_mp
    >>> params = {'w': jnp.ones((64, 128), jnp.bfloat16)}
    >>> state = optax_mp.adamw_4bit(1e-3).init(params)
    >>> arrays = optax_mp.checkpoint.to_arrays(state)
    >>> [name for name in arrays if 'mu' in name and 'codes' in name]
    ['inner_state/inner_state/0/mu/w/codes:int4']
  """
  leaves = _flat.by_name(_boxes.unbox(state), 'state')
  return dict(_viewed(name, x) for name, x in leaves.items())


def from_arrays(
  tx: optax.GradientTransformation,
  params: optax.Params,
  arrays: Mapping[str, np.ndarray],
) -> Any:
  """Rebuilds the state that :func:`to_arrays` turned into NumPy arrays.

  Args:
    tx: the transformation that made the state.
    params: the parameters, or their shapes and dtypes.
    arrays: the result of :func:`to_arrays`, read from a file.

  Returns:
    A state of ``tx``.

  Raises:
    ValueError: for the same reasons as :func:`rebuild`.

  Examples:
    >>> import jax.numpy as jnp, optax_mp
    >>> params = {'w': jnp.ones((64, 128), jnp.bfloat16)}
    >>> tx = optax_mp.adamw_4bit(1e-3)
    >>> arrays = optax_mp.checkpoint.to_arrays(tx.init(params))
    >>> state = optax_mp.checkpoint.from_arrays(tx, params, arrays)
    >>> print(state.inner_state.inner_state[0].mu['w'].codes.dtype)
    int4
  """
  return _rebuild.rebuild(
    tx, params, dict(_restored(name, x) for name, x in arrays.items())
  )


def _viewed(name: str, x: Any) -> tuple[str, np.ndarray]:
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    kind = f'{_KEY}{jax.random.key_impl(x)}'
    return f'{name}{_MARK}{kind}', np.asarray(jax.random.key_data(x))
  x = np.asarray(x)
  if x.dtype.isbuiltin == 1:
    # If the name contains the mark, the dtype is added: the last mark counts.
    return f'{name}{_MARK}{x.dtype.name}' if _MARK in name else name, x
  mark = f'{name}{_MARK}{x.dtype.name}'
  return mark, np.asarray(x, order='C').view(f'u{x.dtype.itemsize}')


def _restored(name: str, x: Any) -> tuple[str, Any]:
  name, mark, dtype = name.rpartition(_MARK)
  if not mark:
    return dtype, x
  if dtype.startswith(_KEY):
    impl = dtype.removeprefix(_KEY)
    return name, jax.random.wrap_key_data(x, impl=impl)
  return name, np.asarray(x).view(jnp.dtype(dtype))
