# SPDX-License-Identifier: Apache-2.0
"""Updates inside of Optax's conditional wrappers.

``apply_if_finite``, ``conditionally_transform`` and ``conditionally_mask`` take
or skip a step by ``lax.cond``. Both branches must return the same dtypes, and
the branch that skips returns the gradients, or zeros like them. For a 16-bit
gradient they need a 16-bit update, where ``compensated`` has a float32 one.

The difference of two 16-bit parameters fits into 16 bits if one is at most
twice the other. If a weight more than halves or doubles in a step, the update
is rounded, so that the sum may miss the new parameter by half a unit in the
last place of the update. The state keeps the residual of the new parameter, so
the float32 weight is then off by as much.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_mp.formats import _paths
from optax_mp.wrappers import _residual


def as_asked_for(gradients: Any, params: Any, updates: Any) -> Any:
  """The updates, in the dtypes that the caller of the step can take.

  Args:
    gradients: the gradients, in the dtypes that the caller passed.
    params: the parameters, in 16 bits or in float32.
    updates: in float32; with them ``optax.apply_updates`` is exact.

  Returns:
    ``updates``; in the dtypes of the gradients if the caller is one of Optax's
    conditional wrappers.

  Raises:
    ValueError: if so, and a parameter's 16-bit gradient has another dtype.
  """
  if not _in_a_branch():
    return updates
  return jax.tree_util.tree_map_with_path(_leaf, params, gradients, updates)


def _leaf(path: Any, param: Any, gradient: Any, update: Any) -> Any:
  dtype = gradient.dtype
  if dtype == update.dtype or dtype not in (jnp.bfloat16, jnp.float16):
    return update
  if dtype != param.dtype:
    raise ValueError(
      '`updates` must have the dtypes of the parameters inside of conditional '
      f'wrappers of Optax; got {dtype} for {param.dtype} at '
      f'{_paths.path_str(path)!r}. Cast the gradients to float32 before, or '
      'take `optax_mp.skip_nonfinite`, which needs no branch, in place of '
      '`optax.apply_if_finite`.'
    )
  # Rounded by integer operations, which no compiler mistakes for the identity.
  format = _residual.format_of(dtype, 0, 'nearest')
  assert format is not None
  return format.encode(update)


def _in_a_branch() -> bool:
  """Whether a conditional wrapper of Optax is among the callers.

  Nothing else shows it: the branch is traced like any other function.
  """
  frame = sys._getframe(1)
  while frame is not None:
    if frame.f_code.co_name == 'do_update':
      if frame.f_globals.get('__name__') in _modules():
        return True
    frame = frame.f_back
  return False


@functools.cache
def _modules() -> frozenset[str]:
  wrappers = (
    optax.apply_if_finite,
    optax.transforms.conditionally_mask,
    optax.transforms.conditionally_transform,
  )
  return frozenset(wrapper.__module__ for wrapper in wrappers)
