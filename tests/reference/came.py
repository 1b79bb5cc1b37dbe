# SPDX-License-Identifier: Apache-2.0
"""CAME in NumPy and float64, step by step."""

import numpy as np


def fac(row, col):
  share = row / row.mean(-1, keepdims=True)
  return 1 / np.sqrt(share[..., :, None] * col[..., None, :])


class Came:
  """One leaf."""

  def __init__(self, shape, betas, eps1, eps2, clip, lr, decay):
    self.b1, self.b2, self.b3 = betas
    self.eps1, self.eps2, self.clip = eps1, eps2, clip
    self.lr, self.decay = lr, decay
    self.mu = np.zeros(shape)
    self.row = self.col = self.nu = 0.0
    self.res_row = self.res_col = 0.0

  def step(self, w, g):
    square = g**2 + self.eps1
    if g.ndim > 1:
      self.row = self.b2 * self.row + (1 - self.b2) * square.mean(-1)
      self.col = self.b2 * self.col + (1 - self.b2) * square.mean(-2)
      u = fac(self.row, self.col) * g
    else:
      self.nu = self.b2 * self.nu + (1 - self.b2) * square
      u = g / np.sqrt(self.nu)
    u = u / max(1.0, np.sqrt((u**2).mean()) / self.clip)
    self.mu = self.b1 * self.mu + (1 - self.b1) * u
    d = self.mu
    if g.ndim > 1:
      away = (u - self.mu) ** 2 + self.eps2
      self.res_row = self.b3 * self.res_row + (1 - self.b3) * away.mean(-1)
      self.res_col = self.b3 * self.res_col + (1 - self.b3) * away.mean(-2)
      d = fac(self.res_row, self.res_col) * self.mu
    return w - self.lr * d - self.lr * self.decay * w
