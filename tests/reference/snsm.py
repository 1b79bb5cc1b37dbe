# SPDX-License-Identifier: Apache-2.0
"""Subset-Norm and Subspace-Momentum in NumPy and float64, step by step."""

import numpy as np


def labels(shape, subset_size, square_axis=0):
  """For each coordinate the number of its subset."""
  numbers = np.arange(int(np.prod(shape))).reshape(shape)
  if subset_size is None:
    return numbers
  if subset_size == 'heuristic':
    if len(shape) < 2:
      return numbers
    m, n = shape
    by_row = m > n or (m == n and square_axis == 0)
    rows, cols = np.indices(shape)
    return rows if by_row else cols
  wanted = subset_size
  if subset_size < 0:
    wanted = int(np.sqrt(numbers.size) / -subset_size)
  k = min(max(wanted, 1), numbers.size)
  while numbers.size % k:
    k -= 1
  return numbers // k


class SnSm:
  """One leaf; `project(t, g)` is P G where a new subspace is chosen."""

  def __init__(
    self,
    shape,
    subset_size='heuristic',
    b1=0.9,
    b2=0.999,
    eps=1e-6,
    lr=1e-2,
    decay=0.0,
    corrected=True,
    new_subspace=None,
    gap=200,
    denominator=True,
    square_axis=0,
  ):
    self.labels = labels(shape, subset_size, square_axis)
    self.b1, self.b2, self.eps = b1, b2, eps
    self.lr, self.decay, self.corrected = lr, decay, corrected
    self.new_subspace, self.gap = new_subspace, gap
    self.denominator = denominator
    self.mu = np.zeros(shape)  # of a subspace, as the vectors that lie in it
    self.v = np.zeros(self.labels.max() + 1)
    self.t = 0

  def step(self, w, g):
    self.t += 1
    t = self.t
    inside = g
    if self.new_subspace is not None:
      if t == 1 or t % self.gap == 0:
        self.subspace = self.new_subspace(g)
        self.mu = np.zeros(g.shape)
      inside = self.subspace(g)
    self.mu = self.b1 * self.mu + (1 - self.b1) * inside
    n = self.mu + (g - inside)
    a = self.lr
    if self.corrected:
      a /= 1 - self.b1**t
    if self.denominator:
      q = np.bincount(self.labels.ravel(), (g**2).ravel(), self.v.size)
      if self.b2 == 1:
        self.v = self.v + q
      else:
        self.v = self.b2 * self.v + (1 - self.b2) * q
      if self.corrected:
        a *= np.sqrt(1 - self.b2**t)
      n = n / (np.sqrt(self.v) + self.eps)[self.labels]
    return w - a * n - self.lr * self.decay * (w - a * n)


def singular_vectors(rank):
  """The subspace of the shorter side's first ones."""

  def choose(g):
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    if g.shape[0] >= g.shape[1]:
      p = vt[:rank].T @ vt[:rank]
      return lambda g: g @ p
    p = u[:, :rank] @ u[:, :rank].T
    return lambda g: p @ g

  return choose


def largest_rows(rank):
  """The subspace of the rows, or columns, of largest norm."""

  def choose(g):
    axis = 0 if g.shape[0] >= g.shape[1] else 1
    norms = (g**2).sum(1 - axis)
    chosen = np.argsort(-norms, kind='stable')[: min(rank, *g.shape)]
    mask = np.isin(np.arange(g.shape[axis]), chosen)
    mask = mask[:, None] if axis == 0 else mask[None, :]
    return lambda g: g * mask

  return choose
