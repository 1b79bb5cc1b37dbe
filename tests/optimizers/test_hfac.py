# SPDX-License-Identifier: Apache-2.0
"""H-Fac against a recorded reference of what is transcribed, and hazards."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_mp import memory
from optax_mp import optimizers
import recorded
from reference import hfac as reference

CASES = recorded.cases('hfac_reference')
FIELDS = {'mu_row': 'u', 'mu_col': 'v', 'nu_row': 'r', 'nu_col': 's'}


def like(case):
  hyper = case['hyper']
  assert hyper['debias']
  return optimizers.hfac(
    hyper['lr'],
    hyper['beta1'],
    hyper['beta2'],
    eps=hyper['eps'],
    clip_threshold=hyper['clip'],
    weight_decay=hyper['weight_decay'],
  )


@pytest.mark.parametrize('name', CASES)
def test_follows_the_recorded_reference(name):
  case = CASES[name]
  states = recorded.assert_follows(like(case), case)
  for state, step in zip(states, case['steps'], strict=True):
    for ours, theirs in FIELDS.items():
      recorded.assert_state(optax.tree.get(state, ours), step[theirs])


def test_says_that_it_is_experimental():
  doc = inspect.getdoc(optimizers.hfac) or ''
  assert doc.startswith('Experimental:')
  assert 'As third parties transcribe the paper; not compared with' in doc


@pytest.mark.parametrize('shape', [(5, 7), (13,), (1, 6), (6, 1), ()])
def test_follows_the_reference(shape):
  """With weight decay, which the recorded cases have not."""
  rng = np.random.default_rng(0)
  slow = reference.HFac(1e-2, 0.1, 0.8, 0.95, clip=0.8)
  tx = optimizers.hfac(1e-2, 0.8, 0.95, clip_threshold=0.8, weight_decay=0.1)
  w = rng.normal(size=shape)
  grads = [rng.normal(size=shape) for _ in range(5)]
  ours = recorded.run(tx, jnp.asarray(w), [jnp.asarray(g) for g in grads])
  for (params, _), g in zip(ours, grads, strict=True):
    w = slow.step(w, g)
    np.testing.assert_allclose(params, w, rtol=0.0, atol=recorded.PARAMS)


def test_vectors_get_adam():
  """kind: derived: of 1 - 0.999 Optax has five digits."""
  rng = np.random.default_rng(1)
  tx, plain = optimizers.scale_by_hfac(), optax.scale_by_adam()
  g = jnp.asarray(rng.normal(size=9))
  state, plain_state = tx.init(g), plain.init(g)
  for _ in range(5):
    g = jnp.asarray(rng.normal(size=9))
    ours, state = tx.update(g, state)
    wanted, plain_state = plain.update(g, plain_state)
    np.testing.assert_allclose(ours, wanted, rtol=1e-4)


def test_the_first_step_has_no_momentum():
  """Both corrections are 0 at t = 1: that is Adafactor. kind: derived."""
  g = jnp.asarray(np.random.default_rng(2).normal(size=(4, 6)))
  tx = optimizers.scale_by_hfac()
  plain = optax.chain(
    optax.scale_by_factored_rms(min_dim_size_to_factor=1),
    optax.clip_by_block_rms(1.0),
  )
  ours, state = tx.update(g, tx.init(g))
  wanted, plain_state = plain.update(g, plain.init(g), g)
  np.testing.assert_allclose(ours, wanted, rtol=1e-5)
  np.testing.assert_array_equal(state.mu_row, jnp.mean(g, -1))
  ours, _ = tx.update(-g, state)
  wanted, _ = plain.update(-g, plain_state, g)
  assert not np.allclose(ours, wanted, rtol=1e-2)


def test_zero_rows_beside_large_gradients_stay_finite():
  g = jnp.zeros((4, 8)).at[1:, 2:].set(1e5)
  tx = optimizers.scale_by_hfac()
  update = jax.jit(tx.update)
  updates, state = update(g, tx.init(g))
  updates, _ = update(-g, state)
  chex.assert_tree_all_finite(updates)
  assert np.all(updates[1:, 2:] != 0)
  np.testing.assert_array_equal(updates[0, :2], 0.0)


@pytest.mark.parametrize('size', [0.0, 1e-18, 1e18])
def test_gradients_of_any_size(size):
  g = jnp.zeros((4, 8)).at[1:, 2:].set(size)
  tx = optimizers.scale_by_hfac()
  updates, state = jax.jit(tx.update)(g, tx.init(g))
  updates, _ = jax.jit(tx.update)(g, state)
  chex.assert_tree_all_finite(updates)
  assert np.all(updates[1:, 2:] != 0) == (size > 0)


def test_sums_of_long_rows_overflow_as_the_docstring_says():
  tx = optimizers.scale_by_hfac()
  for size, finite in (1e17, True), (2e17, False):
    g = jnp.full((2, 10_000), size)
    updates, _ = tx.update(g, tx.init(g))
    assert np.isfinite(updates).all() == finite


@pytest.mark.parametrize('shape', [(4, 5), (6, 1), (4, 5, 1, 1)])
def test_a_stack_is_its_layers(shape):
  rng = np.random.default_rng(3)
  scales = np.reshape([1.0, 9.0, 0.1], (3, *[1] * len(shape)))
  g = jnp.asarray(rng.normal(size=(3, *shape)) * scales)
  tx = optimizers.scale_by_hfac()
  together, state = tx.update(g, tx.init(g))
  together, _ = tx.update(g**3, state)
  for i in range(3):
    apart, state = tx.update(g[i], tx.init(g[i]))
    apart, _ = tx.update(g[i] ** 3, state)
    # kind: derived, sums in another order.
    np.testing.assert_allclose(together[i], apart, rtol=1e-5, atol=1e-6)


def test_a_1x1_kernel_is_a_matrix():
  """kind: exact."""
  g = jnp.asarray(np.random.default_rng(4).normal(size=(4, 8)))
  tx = optimizers.scale_by_hfac()
  kernel, _ = tx.update(g[..., None, None], tx.init(g[..., None, None]))
  matrix, _ = tx.update(g, tx.init(g))
  np.testing.assert_array_equal(kernel[..., 0, 0], matrix)


@pytest.mark.parametrize(
  ('shape', 'bytes'),
  [
    ((4096, 4096), 8 * 8192),
    ((3, 256, 128), 8 * 384 * 3),
    ((256, 256, 1, 1), 8 * 512),
    ((4096,), 8 * 4096),
  ],
)
def test_bytes(shape, bytes):
  """Exact; 4 are the count."""
  p = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  plan = memory.plan(optimizers.hfac(1e-3), p, gradients=None)
  assert plan.total_bytes - 2 * p.size == bytes + 4


@pytest.mark.parametrize(
  ('wrong', 'argument'),
  [
    ({'b1': 1.0}, 'b1'),
    ({'b2': -0.1}, 'b2'),
    ({'eps': 0.0}, 'eps'),
    ({'clip_threshold': 0.0}, 'clip_threshold'),
    ({'adam_eps': 0.0}, 'adam_eps'),
  ],
)
def test_errors_name_the_argument(wrong, argument):
  with pytest.raises(ValueError, match=f'`{argument}`.*got'):
    optimizers.scale_by_hfac(**wrong)
