# SPDX-License-Identifier: Apache-2.0
"""`in_backward.py`: both steps do the same, and what was measured."""

import dataclasses

import chex
import jax.numpy as jnp

import in_backward
import results


def test_both_steps_train_alike():
  """Derived: two programs of float32, after four steps of Adam."""
  tiny = {'layers': 2, 'width': 32, 'heads': 2, 'context': 8, 'batch': 2}
  config = dataclasses.replace(in_backward.CONFIG, **tiny)
  turns = in_backward.prepare(config, in_backward.NAMES[0], {'max_norm': 1.0})
  row = in_backward.measure(turns, pairs=1, steps=2)
  assert (
    row['low'] <= row['ratio'] <= row['high']
    and min(row['seconds'].values()) > 0
  )
  ordinary, ours = (turn.params for turn in turns.values())
  assert ours['blocks']['qkv']['kernel'].dtype == jnp.float32
  chex.assert_trees_all_close(ours, ordinary, rtol=1e-3, atol=1e-5)


def test_one_pass_is_no_slower():
  """Claim: median of pairs, on the machine of the JSON."""
  rows = results.load('in_backward')['rows']
  assert list(rows)[: len(in_backward.NAMES)] == list(in_backward.NAMES)
  for name in in_backward.NAMES:
    assert rows[name]['ratio'] <= 1.0
  # And with a pass for the norm, not twice as long.
  assert all(row['ratio'] < 2.0 for row in rows.values())
