# SPDX-License-Identifier: Apache-2.0
"""H-Fac, as it is transcribed, in NumPy and float64, step by step."""

import numpy as np


class HFac:
  """One leaf: a matrix, or a vector, which gets Adam."""

  def __init__(self, lr, decay, b1=0.9, b2=0.999, eps=1e-30, clip=1.0):
    self.lr, self.decay, self.b1, self.b2 = lr, decay, b1, b2
    self.eps, self.clip = eps, clip
    self.t = 0
    self.u = self.v = self.r = self.s = 0.0

  def corrected(self, b):
    return b * (1 - b ** (self.t - 1)) / (1 - b**self.t)

  def step(self, w, g):
    self.t += 1
    move = self.matrix(g) if g.ndim == 2 else self.adam(g)
    return w - self.lr * (move + self.decay * w)

  def matrix(self, g):
    m, n = g.shape
    b1, b2 = self.corrected(self.b1), self.corrected(self.b2)
    rows, cols = g.mean(1), g.mean(0)
    self.u = b1 * self.u + (1 - b1) * rows
    self.v = b1 * self.v + (1 - b1) * cols
    self.r = b2 * self.r + (1 - b2) * (g**2 + self.eps).sum(1)
    self.s = b2 * self.s + (1 - b2) * (g**2 + self.eps).sum(0)
    phi = b1 * (self.u - rows) / np.sqrt(self.r / n)
    psi = b1 * (self.v - cols) / np.sqrt(self.s / m)
    x = g / np.sqrt(np.outer(self.r, self.s) / self.r.sum())
    x = x / max(1.0, np.sqrt((x**2).mean()) / self.clip)
    return x + (phi[:, None] + psi[None, :]) / 2

  def adam(self, g):
    self.u = self.b1 * self.u + (1 - self.b1) * g
    self.r = self.b2 * self.r + (1 - self.b2) * g**2
    mean = self.u / (1 - self.b1**self.t)
    return mean / (np.sqrt(self.r / (1 - self.b2**self.t)) + 1e-8)
