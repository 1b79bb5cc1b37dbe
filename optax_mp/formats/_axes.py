# SPDX-License-Identifier: Apache-2.0
"""Which axis of a parameter an axis of its state follows."""

from collections.abc import Sequence
from typing import Any

import jax


def follow(
  names: Sequence[Any], shape: Sequence[int], own_shape: Sequence[int]
) -> list[Any]:
  """Names for the axes of an array of the state of a parameter.

  Rows follow rows: an axis gets the name of the next axis of the parameter with
  its length. All else is replicated.

  Args:
    names: of the parameter's axes, the last ones may be missing.
    shape: of the parameter.
    own_shape: of the array.

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
  """Names for the axes of an array, where its type says how it is cut.

  On a mesh with explicit axes the optimizer has decided. Another name would
  have the array cut differently after the first step than before it.

  Args:
    names: of the parameter's axes.
    param: the parameter.
    x: the array.

  Returns:
    A name, or None, for each axis of ``x``; None where the parameter's type
    does not tell that it is cut.
  """
  if not (isinstance(param, jax.Array) and isinstance(x, jax.Array)):
    return None
  theirs, ours = (jax.typeof(a).sharding.spec for a in (param, x))
  if not any(theirs):
    return None
  by_axis = dict(zip(theirs, names, strict=False))
  return [None if cut is None else by_axis.get(cut) for cut in ours]
