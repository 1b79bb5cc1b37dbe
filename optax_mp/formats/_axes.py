# SPDX-License-Identifier: Apache-2.0
"""Which axis of a parameter an axis of its state follows."""

from collections.abc import Callable, Sequence
from typing import Any


def follow(
  names: Sequence[Any],
  shape: Sequence[int],
  own_shape: Sequence[int],
  can_cut: Callable[[int, Any], bool] | None = None,
) -> list[Any]:
  """Names for the axes of an array of the state of a parameter.

  Rows follow rows: an axis gets the name of the next axis of the parameter with
  its length. The axis of block scales, (..., R, C / 128), is cut like C only
  where ``can_cut`` says that whole blocks remain; all else is replicated.

  Args:
    names: of the parameter's axes, the last ones may be missing.
    shape: of the parameter.
    own_shape: of the array.
    can_cut: of a length and a name; None where meshes are not known.

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
  if can_cut and _in_blocks(shape, own_shape):
    own[-1] = names[-1] if can_cut(own_shape[-1], names[-1]) else None
  return own


def _in_blocks(shape: Sequence[int], own_shape: Sequence[int]) -> bool:
  """Whether the array has a value for each block of the last axis."""
  *leading, last = own_shape or (0,)
  blocks = last and shape and shape[-1] % last == 0
  return bool(blocks) and last < shape[-1] and [*shape[:-1]] == leading
