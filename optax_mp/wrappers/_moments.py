# SPDX-License-Identifier: Apache-2.0
"""Checks of a rule for a state, in ``init``."""

from collections.abc import Collection
import re
from typing import Any
import warnings

import jax

from optax_mp.formats import _base
from optax_mp.formats import _paths

# Optax's names of moments that are divided, that others are divided by, or
# whose sign is the update. A sum alone, such as a trace, needs no exact zero.
_MOMENTS = frozenset({'mu', 'nu', 'm1', 'm2'})


def check_wide(like: Any, chosen: list[Any]) -> None:
  """Raises a ValueError if `inner` has rounded a leaf that a format stores."""
  leaves = jax.tree_util.tree_leaves_with_path(like)
  for (path, leaf), format in zip(leaves, chosen, strict=True):
    if format is not None and _base.dtype_bits(leaf.dtype) < 32:
      raise ValueError(
        f'`inner` keeps {_paths.path_str(path)!r} in {leaf.dtype}; got '
        f'{format} for it, which would store what is rounded already. Leave '
        'out `mu_dtype` (or `accumulator_dtype`, `values_dtype`), or ask for '
        'float32: the format takes its place. A parameter of fewer than 16 '
        'bits is for inference: train it in bfloat16.'
      )


def check_zeros(like: Any, params: Any, chosen: list[Any]) -> None:
  """Raises a ValueError for a moment in a format without an exact zero.

  For gradients of zero, such a format decodes a first moment of zero to a small
  number, which Adam would divide by the root of a second moment of zero.
  """
  leaves = jax.tree_util.tree_leaves_with_path(like)
  parts = _paths.split_paths(
    [path for path, _ in leaves], _paths.param_paths(params)
  )
  for (path, _), format in zip(leaves, chosen, strict=True):
    if getattr(format, 'exact_zero', True):
      continue
    if _MOMENTS.intersection(_paths.fields(parts[path][0])):
      raise ValueError(
        f'`rule` gives {format} to the moment {_paths.path_str(path)!r}, but '
        'it has no exact zero: where gradients are zero, an optimizer would '
        'divide a rounding error. Take `formats.BlockInt(4)` or another format '
        'with signs; `Affine` is for errors and gradients.'
      )


def warn_unless_kept(
  params: Collection[_paths.Path], kept: re.Pattern[str] | None
) -> None:
  """Warns if no path has the pattern; the path of another group may have it."""
  if kept is None:
    return
  variables = _paths.are_variables(params)
  names = sorted(_paths.path_str(path, variables) for path in params)
  if not any(map(kept.search, names)):
    warnings.warn(
      '`keep_float32` keeps nothing: it is found in no path of a parameter; '
      f'got {kept.pattern!r} and parameters such as {names[:3]}. Leave it out '
      'where no state is to stay float32.',
      stacklevel=4,
    )
