# SPDX-License-Identifier: Apache-2.0
"""CAME against its authors' code, a slow reference, and its hazards."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compilers import compile_for
import optax_mp
from optax_mp import backward
from optax_mp import formats
from optax_mp import memory
from optax_mp import optimizers
import quick
import recorded
from reference import came as reference
import stacks

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
  if jax.default_backend() == 'cpu':  # which flushes what is no normal number
    updates, _ = jax.jit(plain.update)(g, plain.init(g), g)
    assert not np.isfinite(updates).all()


@pytest.mark.parametrize(
  ('shape', 'size'),
  [((4, 5), 1), ((6, 1), 1), ((4, 5, 1, 1), 1), ((4, 5), 9), ((4, 5, 1, 1), 9)],
)
def test_a_stack_is_its_layers(shape, size):
  """With a clip per slice; else the clip is over all of the leaf.

  Also of matrices that are too small to be factored.
  """
  rng = np.random.default_rng(1)
  scales = np.reshape([1.0, 9.0, 0.1], (3, *[1] * len(shape)))
  g = jnp.asarray(rng.normal(size=(3, *shape)) * scales)
  small = {'min_dim_size_to_factor': size}

  def second(tx):
    @quick.jit
    def update(g):
      _, state = tx.update(g, tx.init(g))
      return tx.update(g**3, state)[0]

    return update

  update = second(optimizers.scale_by_came(per_slice_clip=True, **small))
  together = update(g)
  # kind: derived, sums in another order.
  for layer, own in zip(g, together, strict=True):
    np.testing.assert_allclose(own, update(layer), rtol=1e-5)
  joint = second(optimizers.scale_by_came(**small))(g)
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


def test_small_matrices_are_not_factored():
  """They have the rule of vectors. kind: derived, sums in another order."""
  rng = np.random.default_rng(3)
  tx = optimizers.scale_by_came(min_dim_size_to_factor=7)
  g = jnp.asarray(rng.normal(size=(8, 6)))
  state, flat_state = tx.init(g), tx.init(g.ravel())
  assert [getattr(x, 'shape', None) for x in state[:3]] == [(8, 6)] * 2 + [None]
  for size in (1.0, 1e-2):
    u, state = tx.update(size * g, state)
    flat, flat_state = tx.update(size * g.ravel(), flat_state)
    np.testing.assert_allclose(u.ravel(), flat, rtol=1e-6)
  for shape in (8, 7), (3, 7, 8), (8, 7, 1, 1):
    state = tx.init(jnp.ones(shape))
    assert not jax.tree.leaves(state.nu) and state.nu_row.size


def sizes(tx, grads):
  """Root mean squares of updates."""
  update, state = quick.jit(tx.update), tx.init(grads[0])
  for g in grads:
    u, state = update(g, state)
    yield float(jnp.sqrt(jnp.mean(jnp.square(u))))


@pytest.mark.parametrize('name', recorded.cases('came'))
def test_first_steps_are_as_long_as_the_official_ones(name):
  """kind: derived, from the rounding of recorded parameters."""
  case = recorded.cases('came')[name]
  tx, hyper = like(case), case['hyper']
  found = []
  params = recorded.parameters(case)
  for after, _ in recorded.run(tx, params, recorded.gradients(case)):
    moved = np.subtract(after, params) / hyper['lr']
    found.append(np.sqrt(np.mean(np.square(moved))))
    params = after
  np.testing.assert_allclose(found, case['rms_update_over_lr'], rtol=5e-3)
  default = tuple(hyper['betas']) == (0.9, 0.999, 0.9999)
  if len(case['shape']) > 1:
    low, high = (11.0, 17.2) if default else (1.4, 1.9)
    assert low < min(found) and max(found) < high
  else:
    assert max(found) < 0.22


@pytest.mark.parametrize(
  ('betas', 'first', 'fifth'),
  [((0.9, 0.999, 0.9999), 11.1, 24.6), ((0.9, 0.95, 0.995), 1.6, 3.5)],
)
def test_first_steps_of_equal_gradients(betas, first, fifth):
  """kind: derived, up to rounding; and the digits of the docstring."""
  g = jnp.sign(jnp.asarray(np.random.default_rng(4).normal(size=(8, 6))))
  found = list(sizes(optimizers.scale_by_came(*betas), [g] * 5))
  b1, _, b3 = betas
  assert found[0] == pytest.approx((1 - b1) / b1 / np.sqrt(1 - b3), rel=1e-3)
  assert [round(found[0], 1), round(found[4], 1)] == [first, fifth]
  (vector,) = sizes(optimizers.scale_by_came(*betas), [g[0]])
  assert vector == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize('per_slice_clip', [True, False])
def test_in_the_backward_pass(per_slice_clip):
  """Steps are those of the stack with a clip per slice; kind: derived.

  The biases of all layers would be one matrix: they get AdamW.
  """
  model = stacks.model()
  tx = optimizers.came(
    1e-2,
    per_slice_clip=per_slice_clip,
    matrices=optimizers.hidden_matrices,
  )
  fused = backward.fused_step(stacks.loss_fn, stacks.block_fn, tx)
  step, ordinary = quick.jit(fused), quick.jit(stacks.ordinary(tx))
  params = model.rest, model.stack
  carry = (*params, fused.init(*params))
  state = tx.init(params)
  for _ in range(3):
    *carry, _ = step(*carry, *model.batch)
    params, state, _ = ordinary(params, state, *model.batch)
  apart = jnp.abs(carry[1]['kernel'] - params[1]['kernel']).max()
  assert apart < 1e-5 if per_slice_clip else apart > 1e-3


def test_momentum_in_8_bits():
  """kind: exact bytes; claim: it descends as far, to a tenth."""
  eight = {'mu': formats.BlockInt(8)}
  p = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
  tx = optax_mp.compressed(optimizers.came(1e-4), eight)
  plan = memory.plan(tx, p, gradients=None)
  counts = sum(x.ndim == 0 for x in jax.tree.leaves(jax.eval_shape(tx.init, p)))
  stored = plan.total_bytes - 4 * p.size - 4 * counts
  assert stored == (1 + 1 / 32) * p.size + 8 * 2048
  assert f'{plan.bytes_per_param - 4:.3f}' == '1.047'
  start = jnp.asarray(np.random.default_rng(5).normal(size=(64, 64)))
  left = []
  for wrapped in (False, True):
    tx, w = optimizers.came(1e-3), start
    tx = optax_mp.compressed(tx, eight, min_size=0) if wrapped else tx
    update, state = quick.jit(tx.update), tx.init(w)
    for _ in range(50):
      updates, state = update(w, state, w)
      w = optax.apply_updates(w, updates)
    left.append(float(jnp.linalg.norm(w) / jnp.linalg.norm(start)))
  assert left[1] == pytest.approx(left[0], rel=0.1) and left[0] < 0.5


def test_what_decides_the_program_is_static():
  with pytest.raises(ValueError, match='`min_dim_size_to_factor` must be'):
    optax.inject_hyperparams(optimizers.came)(1e-2).init(jnp.ones((4, 8)))
  with pytest.raises(ValueError, match='`per_slice_clip` must be'):
    optimizers.came(1e-2, per_slice_clip=jnp.asarray(True))  # pyright: ignore


def test_hyperparameters_can_be_injected():
  """kind: derived."""
  g = jnp.asarray(np.random.default_rng(6).normal(size=(4, 8)))
  static = ['min_dim_size_to_factor']
  make = optax.inject_hyperparams(optimizers.came, static_args=static)
  ours, plain = make(1e-2), optimizers.came(1e-2)
  u, state = ours.update(g, ours.init(g), g)
  wanted, _ = plain.update(g, plain.init(g), g)
  np.testing.assert_allclose(u, wanted, rtol=1e-4)
  assert state.hyperparams['b3'] == np.float32(0.9999)


@pytest.mark.parametrize(
  ('wrong', 'argument'),
  [
    ({'b1': 1.0}, 'b1'),
    ({'eps1': 0.0}, 'eps1'),
    ({'b3': -0.1}, 'b3'),
    ({'min_dim_size_to_factor': 0}, 'min_dim_size_to_factor'),
  ],
)
def test_errors_name_the_argument(wrong, argument):
  with pytest.raises(ValueError, match=f'`{argument}`.*got'):
    optimizers.scale_by_came(**wrong)


def test_a_gpu_keeps_one_array_between_two_kernels():
  """kind: claim, of the docstring."""
  tx, p = optimizers.came(1e-3), jax.ShapeDtypeStruct((1024, 1024), jnp.float32)

  def step(params, state, gradients):
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  state = jax.eval_shape(tx.init, p)
  program = compile_for('h100', step, p, state, p, donate_argnums=(0, 1))
  temporaries = memory.report(program).temporary_bytes / p.size
  assert 4 <= temporaries < 4.1
