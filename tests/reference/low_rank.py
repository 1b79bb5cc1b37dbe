# SPDX-License-Identifier: Apache-2.0
"""GaLore, Fira and APOLLO in NumPy and float64, step by step.

The basis of each step is an argument: (r, n) for tall matrices, else (m, r).
"""

import numpy as np


def svd(g, rank):
  """The first singular vectors of the shorter side."""
  u, _, vt = np.linalg.svd(g, full_matrices=False)
  return vt[:rank] if g.shape[0] >= g.shape[1] else u[:, :rank]


class Adam:
  """One leaf; x is the gradient, or what is left of it."""

  def __init__(self, lr=1e-2, betas=(0.9, 0.999), eps=1e-6, decay=0.0):
    self.lr, self.betas, self.eps, self.decay = lr, betas, eps, decay
    self.m = self.v = 0.0
    self.t = 0

  def moments(self, x):
    (b1, b2), self.t = self.betas, self.t + 1
    self.m = b1 * self.m + (1 - b1) * x
    self.v = b2 * self.v + (1 - b2) * x**2
    return self.m / (np.sqrt(self.v) + self.eps)

  def moved(self, w, d):
    b1, b2 = self.betas
    step = self.lr * np.sqrt(1 - b2**self.t) / (1 - b1**self.t) * d
    w = w - step
    return w - self.lr * self.decay * w

  def step(self, w, g):
    return self.moved(w, self.moments(g))


class Galore(Adam):
  def __init__(self, scale=0.25, **adam):
    super().__init__(**adam)
    self.scale = scale

  def step(self, w, g, p):
    if g.shape[0] >= g.shape[1]:
      return self.moved(w, self.scale * self.moments(g @ p.T) @ p)
    return self.moved(w, self.scale * p @ self.moments(p.T @ g))


def limited(s, last):
  """What goes on, and the norm to remember; `last` is None at first."""
  norm = np.linalg.norm(s)
  if last is None:
    return s, norm
  limit = max(norm / (last + 1e-8), 1.01) / 1.01
  return s / limit, norm / limit


def ratio(n, x, axis):
  norms = (np.sqrt((a**2).sum(axis=axis, keepdims=True)) for a in (n, x))
  return next(norms) / (next(norms) + 1e-8)


class Fira(Galore):
  def __init__(self, exact_complement=False, **galore):
    super().__init__(**galore)
    self.taken = 1.0 if exact_complement else self.scale
    self.last = None

  def step(self, w, g, p):
    tall = g.shape[0] >= g.shape[1]
    x = g @ p.T if tall else p.T @ g
    n = self.moments(x)
    back = (lambda x: x @ p) if tall else (lambda x: p @ x)
    s = (g - self.taken * back(x)) * ratio(n, x, 1 if tall else 0)
    s, self.last = limited(s, self.last)
    return self.moved(w, self.scale * back(n) + s)


class Apollo(Adam):
  def __init__(self, scale, scale_type, front=False, limiter=True, **adam):
    super().__init__(**adam)
    self.root, self.scale_type = np.sqrt(scale), scale_type
    self.front, self.limiter, self.last = front, limiter, None

  def step(self, w, g, p):
    tall = g.shape[0] >= g.shape[1]
    x = g @ p.T if tall else p.T @ g
    n = self.moments(x)
    axis = (0, 1) if self.scale_type == 'tensor' else (1 if tall else 0)
    s = g * ratio(n, x, axis)
    if self.front:
      s = self.root * s
    if self.limiter:
      s, self.last = limited(s, self.last)
    if not self.front:
      s = self.root * s
    return self.moved(w, s)
