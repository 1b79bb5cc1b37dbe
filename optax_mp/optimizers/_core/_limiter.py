# SPDX-License-Identifier: Apache-2.0
"""The norm-growth limiter of Fira and APOLLO."""

import chex
import jax.numpy as jnp

_GROWTH = 1.01


def limit_growth(
  s: chex.Array, last: chex.Array
) -> tuple[chex.Array, chex.Array]:
  r"""Keeps the norm of a matrix from growing by more than 1 % a step.

  .. math::
    q = \|S\|, \quad L = \max(q / (p + 10^{-8}), 1.01) / 1.01, \quad
    S \leftarrow S / L, \quad p \leftarrow q / L

  Args:
    s: S, (..., m, n); each matrix of a stack has its own norm.
    last: p, (...), float32: the norm of the step before; 0 if there is none
      yet, and then S stays as it is.

  Returns:
    S, p.
  """
  norm = jnp.sqrt(jnp.sum(jnp.square(s), axis=(-2, -1)))
  limit = jnp.maximum(norm / (last + 1e-8), _GROWTH) / _GROWTH
  limit = jnp.where(last > 0, limit, 1.0)
  return s / limit[..., None, None], norm / limit
