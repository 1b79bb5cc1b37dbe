# SPDX-License-Identifier: Apache-2.0
"""LOMO in NumPy and float64: what is done to a gradient, and one step."""

import numpy as np


def prepared(g, scale=1.0, value=None, coef=1.0):
  g = g / scale
  if value is not None:
    g = np.clip(g, -value, value)
  return g * coef


def coefficient(gradients, max_norm):
  """Of gradients as they are before values are clipped."""
  total = np.sqrt(sum(np.linalg.norm(g) ** 2 for g in gradients))
  return min(1.0, max_norm / (total + 1e-6))


def step(w, g, lr, decay):
  return w - lr * g - lr * decay * w
