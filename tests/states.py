# SPDX-License-Identifier: Apache-2.0
"""States of sixteen kinds after one step, for what saves and converts them."""

from collections.abc import Callable
import dataclasses
import functools
import types
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_mp
from optax_mp import formats
import quick

RATE = 1e-2
BF16 = jnp.bfloat16
NU = formats.BlockInt(8, signed=False, rounding='stochastic')


def by_hand(mu, nu=NU, bits=8):
  """AdamW with moments in formats that no recipe has."""
  small = optax_mp.compressed(optax.adamw(RATE), {'mu': mu, 'nu': nu})
  return optax_mp.compensated(small, bits)


@dataclasses.dataclass(frozen=True)
class Row:
  """What makes a state: a transformation, and the dtype of parameters."""

  make: Callable[[], Any]
  dtype: Any = BF16


INT8 = formats.BlockInt(8)
ROWS = {
  '8bit': Row(lambda: optax_mp.adamw_8bit(RATE)),
  '8bit-b1': Row(lambda: optax_mp.adamw_8bit(RATE, b1=0.95)),
  '8bit-0': Row(lambda: optax_mp.adamw_8bit(RATE, residual_bits=0)),
  '8bit-float16': Row(lambda: optax_mp.adamw_8bit(RATE), jnp.float16),
  '4bit': Row(lambda: optax_mp.adamw_4bit(RATE)),
  'factored': Row(lambda: optax_mp.adamw_4bit_factored(RATE)),
  'coat': Row(lambda: optax_mp.coat_adamw(RATE)),
  'flash': Row(lambda: optax_mp.flash_adamw(RATE)),
  'bf16-16': Row(lambda: optax_mp.adamw_bf16(RATE)),
  'bf16-8': Row(lambda: optax_mp.adamw_bf16(RATE, residual_bits=8)),
  'bf16-0': Row(lambda: optax_mp.adamw_bf16(RATE, residual_bits=0)),
  'feedback': Row(
    lambda: by_hand(
      formats.ErrorFeedback(INT8, formats.BlockInt(4)), formats.Split(8)
    )
  ),
  'softsign': Row(lambda: by_hand(formats.BlockInt(8, map='softsign'))),
  'block64': Row(lambda: by_hand(formats.BlockInt(8, block_size=64))),
  'rank1': Row(lambda: by_hand(formats.BlockInt(8, scale='rank1'))),
  'bfloat16': Row(lambda: by_hand(formats.BFloat16())),
  'float32': Row(lambda: by_hand(None)),
  'adamw': Row(lambda: optax.adamw(RATE), jnp.float32),
}


@functools.cache
def tx_of(name):
  return ROWS[name].make()


def tree(seed, dtype):
  """A matrix that formats store, and a vector that stays as it is."""
  rng = np.random.default_rng(seed)
  return {
    'w': jnp.asarray(0.3 * rng.normal(size=(16, 256)), dtype),
    'b': jnp.asarray(0.3 * rng.normal(size=(40,)), dtype),
  }


def apply(tx, params, state, seed=1):
  """One step; gradients in the parameters' dtype are bfloat16 numbers."""
  return moved(tx, params, state, tree(seed, BF16))


def moved(tx, params, state, gradients):
  """One step with these gradients, in the parameters' dtype."""
  gradients = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, params)
  updates, state = tx.update(gradients, state, params)
  return optax.apply_updates(params, updates), state


@functools.cache
def step_of(name):
  return quick.jit(functools.partial(apply, tx_of(name)))


@functools.cache
def saved(name):
  """(params, state) after one step."""
  params = tree(0, ROWS[name].dtype)
  return step_of(name)(params, tx_of(name).init(params))


@functools.cache
def next_of(name):
  """(params, state) after the step that follows."""
  return step_of(name)(*saved(name))


def is_stored(x):
  return formats.is_stored(x) or isinstance(x, optax.EmptyState)


def kinds(state):
  """The leaves of a state: where, in which format or dtype."""
  pairs = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_stored)
  return types.MappingProxyType(
    {
      jax.tree_util.keystr(path, simple=True, separator='/'): kind(x)
      for path, x in pairs
    }
  )


def kind(x):
  """The name of a format, without that of the field; or a dtype."""
  if hasattr(x, 'dtype'):
    return str(x.dtype)
  fields = [f for f in getattr(x, '_fields', ()) if '__' in f]
  return fields[0].partition('__')[2] if fields else type(x).__name__


def assert_same_bits(*trees):
  """kind: exact. As integers: -0.0 is not 0.0."""

  def view(x):
    x = np.asarray(x)
    return x.view(f'u{x.itemsize}')

  chex.assert_trees_all_equal(*(jax.tree.map(view, tree) for tree in trees))


def assert_same_values(got, expected, rel):
  """kind: derived, `rel` of each value."""
  for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
    assert np.all(np.abs(x - y) <= rel * np.abs(y))
