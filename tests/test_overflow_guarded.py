# SPDX-License-Identifier: Apache-2.0
"""With a guard, one value that overflows costs one step and no parameter.

In every format what is lost is what float32 Adam behind the same guard loses,
which is nothing.
"""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
import quick
import tables

VALUES = (1e20, 3e38, np.inf, np.nan)
FITS = 1e19  # its square is below the largest float32
# The first of a block, one within, the last; (rows, columns) of blocks of 128.
POSITIONS = ((0, 0), (3, 130), (15, 255))
SHAPE = (16, 256)
# What has no exact zero is refused for moments.
FORMATS = [
  name
  for name, row in tables.FORMATS.items()
  if getattr(row.format, 'exact_zero', True)
]


@functools.cache
def stored(format):
  """Adam, the moment that a format is for in that format."""
  row = tables.FORMATS[format]
  rule = {'mu' if row.signed else 'nu': row.format}
  return stepping(optax_mp.compressed(optax.adam(0.1), rule, min_size=0))


@functools.cache
def plain():
  return stepping(optax.adam(0.1))


def stepping(tx):
  tx = optax_mp.skip_nonfinite(tx)

  def step(params, state, gradients):
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  return tx, quick.jit(step)


def gradients(i):
  x = np.random.default_rng(i).normal(size=SHAPE)
  return jnp.asarray(np.sign(x) * (0.5 + np.abs(x)), jnp.float32)


def lost(guarded, position, value):
  """After a bad step: parameters that are not finite or stand still.

  And how many steps were skipped.
  """
  tx, step = guarded
  params = gradients(9)
  carry = step(params, tx.init(params), gradients(0))
  carry = step(*carry, gradients(1).at[position].set(value))
  before, state = step(*carry, gradients(2))
  after, state = step(before, state, gradients(3))
  moves = np.isfinite(after) & (after != before)
  return int(np.sum(~moves)), int(state.total_notfinite)


@pytest.mark.parametrize('name', FORMATS)
def test_no_parameter_is_lost(name):
  """kind: exact, of counts."""
  for position in POSITIONS:
    for value in VALUES:
      assert lost(plain(), position, value) == (0, 1)
      assert lost(stored(name), position, value) == (0, 1), (position, value)


@pytest.mark.parametrize('name', FORMATS)
def test_what_fits_is_no_reason_to_skip(name):
  """kind: exact. Float32 Adam takes that step; float16 cannot store it.

  Where first moments share a scale, the weight itself then stands still: its
  own is stored as the largest of the others.
  """
  assert lost(plain(), POSITIONS[1], FITS) == (0, 0)
  row = tables.FORMATS[name]
  wanted = int(row.signed and bool(row.shares)), int(row.high < 1e5)
  assert lost(stored(name), POSITIONS[1], FITS) == wanted
