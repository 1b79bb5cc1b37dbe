# SPDX-License-Identifier: Apache-2.0
"""Adam-mini in NumPy and float64: a leaf whose coordinates carry labels."""

import numpy as np


class AdamMini:
  """Coordinates with equal labels are a block."""

  def __init__(self, labels, b1, b2, eps, lr, decay):
    self.labels = np.asarray(labels)
    self.b1, self.b2, self.eps = b1, b2, eps
    self.lr, self.decay = lr, decay
    self.m = np.zeros(self.labels.shape)
    self.v = np.zeros(self.labels.max() + 1)
    self.t = 0

  def step(self, w, g):
    self.t += 1
    flat = self.labels.ravel()
    mean = np.bincount(flat, (g**2).ravel()) / np.bincount(flat)
    self.v = self.b2 * self.v + (1 - self.b2) * mean
    self.m = self.b1 * self.m + (1 - self.b1) * g
    w = w - self.lr * self.decay * w
    root = np.sqrt(self.v) / np.sqrt(1 - self.b2**self.t) + self.eps
    return w - self.lr / (1 - self.b1**self.t) * self.m / root[self.labels]
