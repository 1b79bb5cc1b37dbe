# SPDX-License-Identifier: Apache-2.0
"""Finds the axis of a parameter that an axis of its state follows."""

from collections.abc import Sequence
from typing import Any

import jax


def follow(
  names: Sequence[Any], shape: Sequence[int], own_shape: Sequence[int]
) -> list[Any]:
  """Names the axes of an array in the state of a parameter.

  Rows follow rows: an axis gets the name of the parameter's next axis of the
  same length. Axes without a name are replicated.

  Args:
    names: the names of the parameter's axes; the last names may be missing.
    shape: the parameter's shape.
    own_shape: the array's shape.

  Returns:
    A name, or None, for each axis of the array.
  """
  names = [*names, *[None] * (len(shape) - len(names))]
  own: list[Any] = []
  start = 0
  for length in own_shape:
    same = [i for i in range(start, len(shape)) if shape[i] == length]
    own.append(names[same[0]] if same else None)
    start = same[0] + 1 if same else start
  return own


def known(names: Sequence[Any], param: Any, x: Any) -> list[Any] | None:
  """Names the axes of an array if its type says how it is sharded.

  On a mesh with explicit axes the optimizer has decided this. With another name
  the array would be sharded differently before and after the first step.

  Args:
    names: the names of the parameter's axes.
    param: the parameter.
    x: the array.

  Returns:
    A list of a name, or None, for each axis of ``x``. It is None as a whole if
    the parameter's type does not say that the parameter is sharded.
  """
  if not (isinstance(param, jax.Array) and isinstance(x, jax.Array)):
    return None
  theirs, ours = (jax.typeof(a).sharding.spec for a in (param, x))
  if not any(theirs):
    return None
  by_axis = dict(zip(theirs, names, strict=False))
  return [None if cut is None else by_axis.get(cut) for cut in ours]
