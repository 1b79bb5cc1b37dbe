# SPDX-License-Identifier: Apache-2.0
"""Fira against a slow reference: no run of its authors' code is recorded."""

import jax.numpy as jnp
import numpy as np
import pytest

from optax_mp import optimizers
import recorded
from reference import low_rank as reference

# kind: derived. What float32 is away in GaLore's recorded run, times ten.
PARAMS = 2e-6


@pytest.mark.parametrize(
  ('shape', 'exact'),
  [((7, 5), False), ((5, 7), True), ((6, 6), False), ((1, 4), True)],
)
def test_follows_the_reference(shape, exact):
  """Over a refresh, which gets the reference's basis: signs count there."""
  rng = np.random.default_rng(0)
  settings = {'exact_complement': exact, 'scale': 0.5}
  slow = reference.Fira(decay=0.1, betas=(0.9, 0.95), **settings)
  w = rng.normal(size=shape)
  ours, state, basis = jnp.asarray(w), None, None
  for t, size in enumerate([1.0, 3.0, 0.5, 1.0, 10.0, 1.0]):
    g = size * rng.normal(size=shape)
    basis = reference.svd(g, 3) if t % 3 == 0 else basis
    tx = optimizers.fira(
      1e-2,
      3,
      3,
      b2=0.95,
      weight_decay=0.1,
      matrices=None,
      projector=lambda g, rank, key, basis=basis: basis,
      **settings,
    )
    state = tx.init(ours) if state is None else state
    updates, state = tx.update(jnp.asarray(g, jnp.float32), state, ours)
    ours, w = ours + updates, slow.step(w, g, basis)
    np.testing.assert_allclose(ours, w, rtol=0.0, atol=PARAMS)


def test_the_official_complement_is_not_orthogonal():
  """Alone it differs by 1e-2 and more at a learning rate of 1e-2."""
  case = recorded.cases('anchors_official')['galore_adamw']
  ours = [
    list(
      recorded.run(
        optimizers.fira(1e-2, 4, 3, exact_complement=exact, matrices=None),
        recorded.parameters(case),
        recorded.gradients(case),
      )
    )[-1][0]
    for exact in (False, True)
  ]
  for name in ('tall', 'wide'):
    assert np.abs(ours[0][name] - ours[1][name]).max() > 1e-2


@pytest.mark.parametrize('exact', [False, True])
def test_full_rank_leaves_nothing_outside(exact):
  """Then Fira is GaLore with the exact complement, and not without it."""
  rng = np.random.default_rng(1)
  g = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)
  full, galore = (
    optimizers.scale_by_fira(5, exact_complement=exact),
    optimizers.scale_by_galore(5),
  )
  ours, _ = full.update(g, full.init(g))
  theirs, _ = galore.update(g, galore.init(g))
  # kind: derived, the rounding of x P, which f of about 3 multiplies.
  assert np.allclose(ours, theirs, rtol=0.0, atol=1e-5) is exact


def test_leaves_with_one_axis_have_adam():
  g = jnp.asarray(np.random.default_rng(2).normal(size=(9,)))
  slow, w = reference.Adam(decay=0.1), np.ones(9)
  tx = optimizers.fira(1e-2, weight_decay=0.1)
  for params, _ in recorded.run(tx, jnp.ones(9), [g, 2 * g, -g]):
    w = slow.step(w, np.asarray(g) * (1, 2, -1)[slow.t])
    np.testing.assert_allclose(params, w, rtol=0.0, atol=recorded.PARAMS)
