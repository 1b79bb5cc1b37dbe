# SPDX-License-Identifier: Apache-2.0
"""GaLore against its authors' code, a slow reference, and Optax's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_mp import optimizers
import recorded
from reference import low_rank as reference

CASE = recorded.cases('anchors_official')['galore_adamw']
# kind: derived. What another float32 program was away, times six.
PARAMS = 2e-6


def like(case, **own):
  hyper = case['hyper']
  b1, b2 = hyper['betas']
  return optimizers.galore(
    hyper['lr'],
    hyper['rank'],
    hyper['update_proj_gap'],
    scale=hyper['scale'],
    b1=b1,
    b2=b2,
    eps=hyper['eps'],
    matrices=None,
    **own,
  )


def test_follows_the_official_code_with_its_projectors():
  ours = recorded.run_with_projectors(CASE, functools.partial(like, CASE))
  for (params, state), step in zip(ours, CASE['steps'], strict=True):
    for name, leaf in step['state'].items():
      np.testing.assert_allclose(
        params[name], step['params'][name], rtol=0.0, atol=PARAMS
      )
      for own, theirs in {'mu': 'exp_avg', 'nu': 'exp_avg_sq'}.items():
        recorded.assert_state(optax.tree.get(state, own)[name], leaf[theirs])
      np.testing.assert_array_equal(
        optax.tree.get(state, 'projector')[name],
        np.float32(leaf['ortho_matrix']),
      )


def test_follows_the_official_code_with_its_own_svd():
  """Until moments meet a second basis: then signs of vectors count."""
  recorded.assert_follows(like(CASE), CASE, atol=PARAMS, steps=3)


def test_stale_moments_depend_on_signs():
  """kind: claim. The same subspaces, with other signs from the second on."""

  def run(sign):
    params, state = recorded.parameters(CASE), None
    for t, g in enumerate(recorded.gradients(CASE)):
      tx = like(CASE, projector=functools.partial(signed, sign if t else 1))
      state = tx.init(params) if state is None else state
      updates, state = tx.update(g, state, params)
      params = optax.apply_updates(params, updates)
      yield params

  for t, (a, b) in enumerate(zip(run(1), run(-1), strict=True)):
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), a, b)
    assert all(d == 0 if t < 3 else d > 1e-3 for d in apart.values()), apart


def signed(sign, g, rank, key):
  del key
  return sign * jnp.asarray(reference.svd(g, rank), jnp.float32)


@pytest.mark.parametrize('shape', [(7, 5), (5, 7), (6, 6), (1, 4), (11, 1)])
def test_follows_the_reference(shape):
  rng = np.random.default_rng(0)
  slow = reference.Galore(decay=0.1, betas=(0.9, 0.95))
  tx = optimizers.galore(1e-2, 3, 10, b2=0.95, weight_decay=0.1, matrices=None)
  w = rng.normal(size=shape)
  grads = [rng.normal(size=shape) for _ in range(5)]
  basis = reference.svd(grads[0], 3)
  ours = recorded.run(tx, jnp.asarray(w), [jnp.asarray(g) for g in grads])
  for (params, _), g in zip(ours, grads, strict=True):
    w = slow.step(w, g, basis)
    np.testing.assert_allclose(params, w, rtol=0.0, atol=PARAMS)


@pytest.mark.parametrize('shape', [(16, 8), (8, 16)])
def test_optax_projects_the_other_side(shape):
  """Whatever its dimension numbers are, so no setting makes it the official."""
  p = jnp.ones(shape)
  state = optimizers.scale_by_galore(rank=4).init(p)
  assert state.mu.size == 4 * 16 and state.projector.size == 4 * 8
  for axes in ((0, 1), (1, 0)):
    numbers = optax.contrib.GaLoreDimensionNumbers(*axes)
    theirs = optax.contrib.scale_by_galore(
      rank=4, weight_dimension_numbers=numbers
    ).init(p)
    assert theirs.base_optimizer_state.mu.size == 4 * 8
    assert theirs.projector.size == 4 * 16


def test_of_one_side_optax_does_the_same():
  """Where both project the same side of a square matrix, eps apart."""
  rng = np.random.default_rng(3)
  params = jnp.asarray(rng.normal(size=(6, 6)))
  grads = [jnp.asarray(rng.normal(size=(6, 6))) for _ in range(3)]
  tx = optimizers.galore(1e-2, 2, 10, eps=1e-30, scale=1.0, matrices=None)
  plain = optax.contrib.galore(
    1e-2, 2, 10, base_optimizer=optax.scale_by_adam(eps=0.0)
  )
  ours = recorded.run(tx, params, grads)
  theirs = recorded.run(plain, params.T, [g.T for g in grads])
  for (a, _), (b, _) in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b.T, rtol=0.0, atol=PARAMS)
