# SPDX-License-Identifier: Apache-2.0
"""Updates inside of Optax's conditional wrappers.

``apply_if_finite``, ``conditionally_transform`` and ``conditionally_mask`` take
a step or leave it, by ``lax.cond``. Its branches must agree on dtypes, and the
other one returns the gradients, or zeros like them. So of a 16-bit gradient
they ask for a 16-bit update, where ``compensated`` has float32.

The difference of two 16-bit parameters has 16 bits where one is at most twice
the other. Elsewhere, where weights more than halve or double in a step, the sum
may miss the new parameter, by half a bit of the update: as much as the gradient
was rounded by. What is in the state is then the residual of where it lands.
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
  """Updates in the dtypes that whoever asked for the step can take.

  Args:
    gradients: as they came.
    params: 16-bit ones, or float32.
    updates: in float32; ``optax.apply_updates`` lands on new parameters.

  Returns:
    The last; in the dtypes of the gradients if one of Optax's conditional
    wrappers calls.

  Raises:
    ValueError: if it does, and a gradient has fewer bits than its parameter.
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
  # Rounds by integers: no compiler takes the result for the float32 it was.
  format = _residual.format_of(dtype, 0, 'nearest')
  assert format is not None
  return format.encode(update)


def _in_a_branch() -> bool:
  """Whether a conditional wrapper of Optax is among the callers.

  There is no other sign of it: its branch is traced like any other function.
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
