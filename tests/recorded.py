# SPDX-License-Identifier: Apache-2.0
"""Recorded runs of optimizers, and how closely ours must follow them.

`vectors/*.json` were made by the authors' codes, or by references of our own
where the file's name says so; each tells its `source`.
"""

import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import quick

FOLDER = pathlib.Path(__file__).parent / 'vectors'
# kind: derived. Five times and more what another float32 program was away; of
# states relative to the largest of an array.
PARAMS = 5e-7
STATES = 1e-5


@functools.cache
def cases(name):
  """All cases of a file, by name."""
  data = json.loads((FOLDER / f'{name}.json').read_text())
  return {case['name']: case for case in data['cases']}


def parameters(case):
  """What a case starts from, a tree."""
  start = case.get('params0', case.get('param0'))
  return jax.tree.map(array, start, is_leaf=lambda x: isinstance(x, list))


def gradients(case):
  """A tree a step."""
  return [
    jax.tree.map(array, g, is_leaf=lambda x: isinstance(x, list))
    for g in case['grads']
  ]


def expected(case, key='steps'):
  """Parameters after each step, a tree a step."""
  return [
    jax.tree.map(
      np.asarray,
      step.get('params', step.get('param')),
      is_leaf=lambda x: isinstance(x, list),
    )
    for step in case[key]
  ]


def array(x):
  return jnp.asarray(np.asarray(x), jnp.float32)


def run(tx, params, grads, **extra):
  """Yields (parameters, state) after each step, compiled once."""

  @quick.jit
  @chex.assert_max_traces(n=1)
  def step(params, state, g):
    updates, state = tx.update(g, state, params, **extra)
    return optax.apply_updates(params, updates), state

  chex.clear_trace_counter()
  state = tx.init(params)
  for g in grads:
    params, state = step(params, state, g)
    yield params, state


def assert_follows(tx, case, atol=PARAMS, steps=None, key='steps'):
  """Parameters within `atol` after every step; returns the states."""
  states = []
  ours = run(tx, parameters(case), gradients(case)[:steps])
  wanted = expected(case, key)[:steps]
  for (params, state), after in zip(ours, wanted, strict=True):
    chex.assert_trees_all_close(params, after, rtol=0.0, atol=atol)
    states.append(state)
  return states


def assert_state(ours, wanted, tolerance=STATES):
  """Relative to the largest of the array: small ones may be near zero."""
  wanted = np.asarray(wanted, np.float64)
  ours = np.asarray(ours, np.float64).reshape(wanted.shape)
  np.testing.assert_allclose(
    ours, wanted, rtol=0.0, atol=tolerance * np.abs(wanted).max()
  )


def run_with_projectors(case, make):
  """As `run`, of tall and wide leaves with the projectors that were recorded.

  Args:
    case: whose states have an `ortho_matrix`, new each `update_proj_gap` steps.
    make: `make(projector=...)` is the transformation.
  """
  params, state = parameters(case), None
  for t, g in enumerate(gradients(case)):
    if t % case['hyper']['update_proj_gap'] == 0:
      bases = {
        params[name].shape: array(leaf['ortho_matrix'])
        for name, leaf in case['steps'][t]['state'].items()
      }
      tx = make(projector=lambda g, rank, key, bases=bases: bases[g.shape])
      step = jax.jit(tx.update)
    state = tx.init(params) if state is None else state
    updates, state = step(g, state, params)
    params = optax.apply_updates(params, updates)
    yield params, state
