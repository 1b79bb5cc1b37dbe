# SPDX-License-Identifier: Apache-2.0
"""The data of the small examples: digits that scikit-learn brings along."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Digits(NamedTuple):
  """Images between 0 and 1 and the digits they show, for both purposes."""

  images: np.ndarray
  test_images: np.ndarray
  labels: np.ndarray
  test_labels: np.ndarray


def load(*shape: int, dtype: str = 'float32', seed: int = 0) -> Digits:
  """Returns 1,437 images to train on and 360 to test with, each of `shape`."""
  images, labels = load_digits(return_X_y=True)
  images = images.reshape(-1, *shape).astype(dtype) / 16
  parts: Any = train_test_split(
    images, labels, test_size=0.2, random_state=seed, stratify=labels
  )
  return Digits(*parts)


def batches(
  digits: Digits, size: int, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the batches of one epoch; with another seed in another order."""
  order = np.random.default_rng(seed).permutation(len(digits.images))
  for first in range(0, len(order) - size + 1, size):
    rows = order[first : first + size]
    yield digits.images[rows], digits.labels[rows]
