# SPDX-License-Identifier: Apache-2.0
"""CAME against its authors' code, a slow reference, and its hazards."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_mp import memory
from optax_mp import optimizers
import recorded
from reference import came as reference

FIELDS = {
  'mu': 'exp_avg',
  'nu': 'exp_avg_sq',
  'nu_row': 'exp_avg_sq_row',
  'nu_col': 'exp_avg_sq_col',
  'res_row': 'exp_avg_res_row',
  'res_col': 'exp_avg_res_col',
}


def like(case):
  hyper = case['hyper']
  return optimizers.came(
    hyper['lr'],
    *hyper['betas'],
    eps1=hyper['eps1'],
    eps2=hyper['eps2'],
    clip_threshold=hyper['clip_threshold'],
    weight_decay=hyper['weight_decay'],
  )


@pytest.mark.parametrize('name', recorded.cases('came'))
def test_follows_the_official_code(name):
  case = recorded.cases('came')[name]
  states = recorded.assert_follows(like(case), case)
  for state, step in zip(states, case['steps'], strict=True):
    for ours, theirs in FIELDS.items():
      if theirs in step['state']:
        leaf = optax.tree.get(state, ours)
        recorded.assert_state(leaf, step['state'][theirs])


@pytest.mark.parametrize('shape', [(5, 7), (13,), (1, 6), (6, 1), ()])
def test_follows_the_reference(shape):
  rng = np.random.default_rng(0)
  slow = reference.Came(shape, (0.9, 0.95, 0.995), 1e-30, 1e-16, 1.0, 1e-2, 0.1)
  tx = optimizers.came(1e-2, 0.9, 0.95, 0.995, weight_decay=0.1)
  w = rng.normal(size=shape)
  grads = [rng.normal(size=shape) for _ in range(5)]
  ours = recorded.run(tx, jnp.asarray(w), [jnp.asarray(g) for g in grads])
  for (params, _), g in zip(ours, grads, strict=True):
    w = slow.step(w, g)
    np.testing.assert_allclose(params, w, rtol=0.0, atol=recorded.PARAMS)


def test_zero_rows_beside_large_gradients_stay_finite():
  """Optax's own factored root mean square makes NaN of them."""
  g = jnp.zeros((4, 8)).at[1:, 2:].set(1e5)
  tx, plain = (
    optimizers.scale_by_came(),
    optax.scale_by_factored_rms(min_dim_size_to_factor=1),
  )
  updates, _ = jax.jit(tx.update)(g, tx.init(g))
  chex.assert_tree_all_finite(updates)
  assert np.all(updates[1:, 2:] != 0) and np.all(updates[0] == 0)
  updates, _ = jax.jit(plain.update)(g, plain.init(g), g)
  assert not np.isfinite(updates).all()


def test_a_stack_is_its_layers():
  """With a clip per slice; else the clip is over all of the leaf."""
  rng = np.random.default_rng(1)
  g = jnp.asarray(rng.normal(size=(3, 4, 5)) * [[[1.0]], [[9.0]], [[0.1]]])
  tx = optimizers.scale_by_came(per_slice_clip=True)
  together, state = tx.update(g, tx.init(g))
  together, _ = tx.update(g**3, state)
  for i in range(3):
    apart, state = tx.update(g[i], tx.init(g[i]))
    apart, _ = tx.update(g[i] ** 3, state)
    # kind: derived, sums in another order.
    np.testing.assert_allclose(together[i], apart, rtol=1e-5)
  tx = optimizers.scale_by_came()
  _, state = tx.update(g, tx.init(g))
  joint, _ = tx.update(g**3, state)
  assert not np.allclose(together, joint, rtol=1e-2)


@pytest.mark.parametrize(
  ('shape', 'bytes'),
  [
    ((4096, 4096), 4 + 8 * 8192 / 4096**2),
    ((4096,), 8),
    ((3, 3, 256, 256), 4 + 8 * 512 / 256**2),  # Flax
    ((256, 256, 3, 3), 4 + 8 * 6 / 9),  # PyTorch
    ((256, 256, 1, 1), 4 + 8 * 512 / 256**2),
  ],
)
def test_bytes(shape, bytes):
  """Exact."""
  p = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  plan = memory.plan(optimizers.scale_by_came(), p, gradients=None)
  np.testing.assert_allclose(plan.bytes_per_param - 2, bytes, rtol=1e-12)


def test_a_1x1_kernel_is_a_matrix():
  g = jnp.asarray(np.random.default_rng(2).normal(size=(4, 8)))
  tx = optimizers.scale_by_came()
  kernel, _ = tx.update(g[..., None, None], tx.init(g[..., None, None]))
  matrix, _ = tx.update(g, tx.init(g))
  np.testing.assert_array_equal(kernel[..., 0, 0], matrix)


@pytest.mark.parametrize(
  ('wrong', 'argument'),
  [({'b1': 1.0}, 'b1'), ({'eps1': 0.0}, 'eps1'), ({'b3': -0.1}, 'b3')],
)
def test_errors_name_the_argument(wrong, argument):
  with pytest.raises(ValueError, match=f'`{argument}`.*got'):
    optimizers.scale_by_came(**wrong)
