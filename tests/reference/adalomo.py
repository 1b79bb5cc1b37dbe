# SPDX-License-Identifier: Apache-2.0
"""AdaLomo in NumPy and float64, step by step."""

import numpy as np


def rms(x):
  return np.sqrt((x**2).mean())


class AdaLomo:
  """One leaf, a vector or one matrix."""

  def __init__(self, lr, decay, eps1=1e-30, eps2=1e-3, clip=1.0, rate=-0.8):
    self.lr, self.decay, self.clip, self.rate = lr, decay, clip, rate
    self.eps1, self.eps2 = eps1, eps2
    self.t, self.row, self.col, self.nu = 0, 0.0, 0.0, 0.0

  def step(self, w, g):
    self.t += 1
    b = 1 - self.t**self.rate
    square = g**2 + self.eps1
    if g.ndim == 2:
      self.row = b * self.row + (1 - b) * square.mean(1)
      self.col = b * self.col + (1 - b) * square.mean(0)
      v = np.outer(self.row, self.col) / self.row.mean()
    else:
      self.nu = b * self.nu + (1 - b) * square
      v = self.nu
    u = g / np.sqrt(v)
    u = u / max(1.0, rms(u) / self.clip)
    a = self.lr * max(self.eps2, rms(w))
    return w - a * u - a * self.decay * w
