# SPDX-License-Identifier: Apache-2.0
"""Refuses derivatives through stored arrays, where JAX would return 0.

Formats round by integer operations, whose derivative is 0 in JAX. Without an
error, the derivative of a loss with respect to the learning rate, through some
steps of training, would silently be 0.
"""

import functools
from typing import Any

import jax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp


def refused(tree: Any) -> Any:
  """The same tree, whose floats raise a ValueError if they are differentiated.

  It costs nothing at run time: the compiler sees the identity.

  Args:
    tree: the arrays that integer operations read next.

  Returns:
    The same values.
  """
  return jax.tree.map(_refused, tree)


def _refused(x: Any) -> Any:
  # Outside all transformations there is nothing to differentiate.
  if not isinstance(x, Tracer):
    return x
  return _identity(x) if jnp.issubdtype(x.dtype, jnp.floating) else x


@jax.custom_jvp
def _identity(x: Any) -> Any:
  return x


@functools.partial(_identity.defjvp, symbolic_zeros=True)
def _identity_jvp(primals: Any, tangents: Any) -> Any:
  (x,), (tangent,) = primals, tangents
  if isinstance(tangent, SymbolicZero):
    return x, tangent
  raise ValueError(
    'a derivative through a step of `optax_mp` is not defined: got one of '
    f'{x.dtype}{list(x.shape)}, which is rounded and stored in integer bits '
    'here, and JAX would return 0. For gradients of hyperparameters or of '
    'initial parameters, take the Optax optimizer itself on float32 '
    'parameters; or put `jax.lax.stop_gradient` around what has no gradient.'
  )
