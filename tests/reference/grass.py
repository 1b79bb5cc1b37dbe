# SPDX-License-Identifier: Apache-2.0
"""Grass in NumPy and float64, step by step; its draws are given."""

import numpy as np


def norms(g, axis):
  return np.sqrt((g**2).sum(-1 if axis == -2 else -2))


def share(g, axis, rule):
  """The probability of each row."""
  n = norms(g, axis)
  if rule == 'uniform' or not n.sum():
    return np.full(n.shape, 1 / n.size)
  return n / n.sum()


class Grass:
  """One matrix."""

  def __init__(self, axis, rank, gap, alpha, adam, lr, decay, rewarm=0):
    self.axis, self.rank, self.gap = axis, rank, gap
    self.alpha, self.adam, self.lr = alpha, adam, lr
    self.decay, self.rewarm = decay, rewarm
    self.count = 0

  def step(self, w, g, draw=None):
    """`draw` is (indices, rho) of a refresh, None: those of largest norm."""
    b1, b2, eps = self.adam
    if self.count % self.gap == 0:
      order = np.argsort(-norms(g, self.axis), kind='stable')
      ones = np.ones(self.rank)
      self.indices, self.rho = draw or (order[: self.rank], ones)
      self.m = self.v = 0.0
      self.age = 0
    self.count += 1
    self.age += 1
    rows = g if self.axis == -2 else g.T
    x = self.rho[:, None] * rows[self.indices]
    self.m = b1 * self.m + (1 - b1) * x
    self.v = b2 * self.v + (1 - b2) * x**2
    d = self.m / (1 - b1**self.age)
    d = d / (np.sqrt(self.v / (1 - b2**self.age)) + eps)
    u = np.zeros_like(rows)
    for j, i in enumerate(self.indices):
      u[i] += self.rho[j] * d[j]
    u = u if self.axis == -2 else u.T
    if self.rewarm:
      u = u * min(1, self.age / self.rewarm)
    return w - self.lr * (self.alpha * u + self.decay * w)
