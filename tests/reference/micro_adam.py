# SPDX-License-Identifier: Apache-2.0
"""MicroAdam in NumPy and float64, step by step, dense."""

import math

import numpy as np


def stored(x, bucket):
  """What 4 bits between the ends of each bucket leave of a vector."""
  out = np.empty_like(x)
  for i in range(0, x.size, bucket):
    part = x[i : i + bucket]
    low, step = part.min(), np.ptp(part) / 15
    code = np.floor((part - low) / step + 0.5).clip(0, 15) if step else 0
    out[i : i + bucket] = low + code * step
  return out


class MicroAdam:
  """One matrix as it lies in memory, or one row."""

  def __init__(self, window, density, block, bucket, adam, lr, decay, alpha=0):
    self.window, self.density, self.block = window, density, block
    self.bucket, self.adam, self.lr = bucket, adam, lr
    self.decay, self.alpha = decay, alpha
    self.gradients = []  # the newest first
    self.error = 0.0
    self.count = 0

  def step(self, w, g):
    b1, b2, eps = self.adam
    self.count += 1
    a = g.ravel() + self.error
    kept = np.zeros_like(a)
    for i in range(0, a.size, self.block):
      part = a[i : i + self.block]
      count = math.ceil(part.size * self.density)
      top = i + np.argsort(-np.abs(part), kind='stable')[:count]
      kept[top], a[top] = a[top], 0
    self.gradients = [kept, *self.gradients][: self.window]
    self.error = self._stored(a)
    z1 = sum(b1**s * v for s, v in enumerate(self.gradients))
    z2 = sum(b2**s * v**2 for s, v in enumerate(self.gradients))
    m = (1 - b1) * z1 / (1 - b1**self.count)
    v = (1 - b2) * z2 / (1 - b2**self.count)
    u = m / (np.sqrt(v) + eps)
    if self.alpha:
      u = u + self.alpha * self.error
      self.error = self._stored((1 - self.alpha) * self.error)
    return w * (1 - self.lr * self.decay) - self.lr * u.reshape(w.shape)

  def _stored(self, a):
    """Buckets lie within blocks."""
    blocks = range(0, a.size, self.block)
    parts = [stored(a[i : i + self.block], self.bucket) for i in blocks]
    return np.concatenate(parts)
