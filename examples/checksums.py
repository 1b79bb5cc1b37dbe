# SPDX-License-Identifier: Apache-2.0
"""Checksums of arrays: a flipped bit in a checkpoint is noticed.

Orbax does not notice most of them: it stores arrays compressed, or as they are,
and a disk, a network or a memory that changes one bit of a moment or of a code
gives a run that goes on with other numbers. `of` is saved beside the arrays,
`verify` compares what was restored with it:

  sums = checksums.of(tree)
  checksums.verify(restored, sums)  # a ValueError names the first bad leaf
"""

from typing import Any
import zlib

import chex
import jax
import numpy as np


def of(tree: chex.ArrayTree) -> dict[str, str]:
  """Returns dtype, shape and CRC-32 of the bytes of each leaf, by its path.

  A CRC-32 notices every change of up to 32 bits in a row, and all but one of
  4 billion other changes. It guards against accidents, not against forgery. A
  CPU reads 1.5 to 4 GB/s, which adds 2 to 13 % to the time of a save.
  """
  return {
    jax.tree_util.keystr(path): _of_leaf(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _of_leaf(leaf: Any) -> str:
  """One leaf at a time comes to the host."""
  array = np.asarray(leaf)
  # As bytes, because zlib knows neither bfloat16 nor int4.
  data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  return f'{array.dtype}{list(array.shape)} {zlib.crc32(data.data):08x}'


def verify(tree: chex.ArrayTree, saved: dict[str, str]) -> None:
  """Compares restored arrays with the checksums that were saved with them.

  Args:
    tree: what was restored.
    saved: what `of` returned before the save.

  Raises:
    ValueError: if a leaf differs, is missing or has been added.
  """
  found = of(tree)
  for path in saved | found:
    if found.get(path) != saved.get(path):
      raise ValueError(
        f'{path} is {found.get(path, "missing")}, '
        f'but {saved.get(path, "nothing")} was saved'
      )
