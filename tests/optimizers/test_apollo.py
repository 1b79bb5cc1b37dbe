# SPDX-License-Identifier: Apache-2.0
"""APOLLO against its authors' code and a slow reference; its random draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_mp import optimizers
import quick
import recorded
from reference import low_rank as reference

CASE = recorded.cases('anchors_official')['apollo_tensor_random']
# kind: derived. What another float32 program was away, times six.
PARAMS = 2e-6


def like(case, **own):
  hyper = case['hyper']
  b1, b2 = hyper['betas']
  return optimizers.apollo_mini(
    hyper['lr'],
    hyper['scale'],
    hyper['update_proj_gap'],
    b1=b1,
    b2=b2,
    eps=hyper['eps'],
    matrices=None,
    store_projection=True,
    **own,
  )


def test_follows_the_official_code_with_its_projections():
  fields = {'mu': 'exp_avg', 'nu': 'exp_avg_sq', 'norm': 'scaled_grad'}
  ours = recorded.run_with_projectors(CASE, functools.partial(like, CASE))
  for (params, state), step in zip(ours, CASE['steps'], strict=True):
    for name, leaf in step['state'].items():
      np.testing.assert_allclose(
        params[name], step['params'][name], rtol=0.0, atol=PARAMS
      )
      for own, theirs in fields.items():
        recorded.assert_state(optax.tree.get(state, own)[name], leaf[theirs])
      np.testing.assert_array_equal(
        optax.tree.get(state, 'projector')[name],
        np.float32(leaf['ortho_matrix']),
      )


@pytest.mark.parametrize(
  ('shape', 'scale_type', 'front', 'limiter'),
  [
    ((7, 5), 'channel', False, True),
    ((5, 7), 'channel', True, True),
    ((6, 6), 'tensor', False, True),
    ((1, 4), 'channel', False, False),
    ((11, 1), 'tensor', True, True),
  ],
)
def test_follows_the_reference(shape, scale_type, front, limiter):
  """On the projections that are drawn."""
  rng = np.random.default_rng(0)
  adam = {'betas': (0.9, 0.95), 'decay': 0.1}
  slow = reference.Apollo(4.0, scale_type, front, limiter, **adam)
  tx = optimizers.apollo(
    1e-2,
    3,
    3,
    scale=4.0,
    scale_type=scale_type,
    scale_front=front,
    limiter=limiter,
    b2=0.95,
    weight_decay=0.1,
    matrices=None,
    store_projection=True,
  )
  w = rng.normal(size=shape)
  sizes = [1.0, 3.0, 0.5, 1.0, 10.0, 1.0]
  grads = [size * rng.normal(size=shape) for size in sizes]
  ours = recorded.run(tx, jnp.asarray(w), [jnp.asarray(g) for g in grads])
  for (params, state), g in zip(ours, grads, strict=True):
    w = slow.step(w, g, np.float64(optax.tree.get(state, 'projector')))
    np.testing.assert_allclose(params, w, rtol=0.0, atol=PARAMS)


def run(tx, params, steps=5):
  rng = np.random.default_rng(1)
  grads = [
    jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
    for _ in range(steps)
  ]
  return [step for step in recorded.run(tx, params, grads)]


def test_what_is_drawn_again_is_what_would_be_stored():
  """Exact."""
  params = {'tall': jnp.ones((6, 4)), 'wide': jnp.ones((3, 4, 6))}
  tx = functools.partial(optimizers.scale_by_apollo, 2, 2)
  drawn, stored = run(tx(), params), run(tx(store_projection=True), params)
  for (a, _), (b, _) in zip(drawn, stored, strict=True):
    jax.tree.map(np.testing.assert_array_equal, a, b)
  shapes = (state.projector['wide'] for state in (drawn[-1][1], stored[-1][1]))
  assert [getattr(p, 'shape', None) for p in shapes] == [
    None,
    (3, 4, 2),
  ]


def test_projections_are_normal_and_differ():
  """By leaf, layer, seed and draw; each of a stack has its own.

  kind: statistical, five standard errors of a mean of squares.
  """
  params = {'a': jnp.ones((2, 96, 64)), 'b': jnp.ones((2, 96, 64))}
  make = functools.partial(optimizers.scale_by_apollo, 8, 1)
  tx, other = (make(store_projection=True, seed=seed) for seed in (0, 1))
  start = tx.init(params)
  update = jax.jit(lambda state, **extra: tx.update(params, state, **extra)[1])
  states = [
    update(start),
    update(start._replace(count=start.count + 1)),
    update(other.init(params)),
    *[update(start, layer=jnp.int32(i)) for i in (0, 1)],
  ]
  draws = [
    matrix
    for state in states
    for leaf in state.projector.values()
    for matrix in np.asarray(leaf)
  ]
  assert len(draws) == len(np.unique(draws, axis=0)) == 20
  entries = np.sqrt(8) * np.ravel(draws)
  assert abs(entries.mean()) < 5 / np.sqrt(entries.size)
  assert abs((entries**2).mean() - 1) < 5 * np.sqrt(2 / entries.size)


def test_layers_of_vmap_have_the_same_projection():
  """Exact, as the caveat says: they have one key. Those of a stack have not."""
  g = jnp.asarray(np.random.default_rng(4).normal(size=(3, 6, 4)))
  tx = optimizers.scale_by_apollo(2, store_projection=True)
  state = jax.vmap(tx.init)(g)
  _, apart = quick.jit(jax.vmap(tx.update))(g, state)
  assert len(np.unique(apart.projector, axis=0)) == 1
  _, stacked = quick.jit(tx.update)(g, tx.init(g))
  assert len(np.unique(stacked.projector, axis=0)) == 3


def test_mini_is_apollo_along_one_direction():
  params = jnp.ones((6, 4))
  mini = run(optimizers.apollo_mini(1e-2, matrices=None, seed=3), params)
  settings = {'scale': 128.0, 'scale_type': 'tensor', 'seed': 3}
  same = run(optimizers.apollo(1e-2, 1, matrices=None, **settings), params)
  for (a, _), (b, _) in zip(mini, same, strict=True):
    np.testing.assert_array_equal(a, b)


def test_only_random_projections_can_be_drawn_again():
  with pytest.raises(ValueError, match='`store_projection` must be True.*got'):
    optimizers.scale_by_apollo(projector='svd')
  g = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
  tx = optimizers.scale_by_apollo(2, projector='svd', store_projection=True)
  _, state = tx.update(g, tx.init(g))
  gram = state.projector @ state.projector.T
  np.testing.assert_allclose(gram, np.eye(2), rtol=0.0, atol=1e-6)
