# SPDX-License-Identifier: Apache-2.0
"""AdaLomo against its authors' code, a slow reference, Adafactor, hazards."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_mp import backward
from optax_mp import memory
from optax_mp import optimizers
import recorded
from reference import adalomo as reference
from reference import lomo as prepare
import stacks

CASES = recorded.cases('adalomo')
CLOSE = {'rtol': 1e-6, 'atol': 1e-7}  # derived: 8 float32 ulps
FIELDS = {
  'nu': 'exp_avg_sq',
  'nu_row': 'exp_avg_sq_row',
  'nu_col': 'exp_avg_sq_col',
}


def schedule(case):
  rates = jnp.asarray(case['hyper']['lr_per_step'], jnp.float32)
  return lambda count: rates[count]


def like(case):
  hyper = case['hyper']
  return optimizers.adalomo(
    schedule(case),
    hyper['decay_rate'],
    hyper['clip_threshold'],
    eps1=hyper['eps1'],
    eps2=hyper['eps2'],
    weight_decay=hyper['weight_decay'],
  )


def as_official(tx, scale, max_norm):
  """The loss is scaled, and a first pass has the norm of all gradients."""

  def update(gradients, state, params):
    extra = {'loss_scale': scale}
    if max_norm is not None:
      norm = optax.tree.norm(gradients)
      extra['clip_coef'] = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    gradients = jax.tree.map(lambda g: scale * g, gradients)
    return tx.update(gradients, state, params, **extra)

  return optax.GradientTransformation(tx.init, update)


@pytest.mark.parametrize('name', CASES)
def test_follows_the_official_code(name):
  case = CASES[name]
  hyper = case['hyper']
  tx = as_official(like(case), hyper['loss_scale'], hyper['clip_grad_norm'])
  states = recorded.assert_follows(tx, case)
  for state, step in zip(states, case['steps'], strict=True):
    for leaf, theirs in step['state'].items():
      for ours, key in FIELDS.items():
        if key in theirs:
          recorded.assert_state(optax.tree.get(state, ours)[leaf], theirs[key])


def test_coefficients_are_the_official_ones():
  case = CASES['clip_norm_1_two_pass']
  for g, step in zip(case['grads'], case['steps'], strict=True):
    ours = prepare.coefficient(map(np.asarray, g.values()), 1.0)
    assert ours == pytest.approx(step['clip_coef'], rel=1e-6)
    assert ours < 1


@pytest.mark.parametrize('shape', [(5, 7), (13,), (1, 6), (6, 1), ()])
def test_follows_the_reference(shape):
  """With all that the recorded cases lack: odd sizes, a clip of values."""
  rng = np.random.default_rng(0)
  slow = reference.AdaLomo(0.03, 0.1, clip=0.8)
  tx = optimizers.adalomo(
    0.03, clip_threshold=0.8, clip_value=0.5, weight_decay=0.1
  )
  w = rng.normal(size=shape)
  grads = [rng.normal(size=shape) for _ in range(5)]
  scaled = [jnp.asarray(8 * g) for g in grads]
  extra = {'loss_scale': 8.0, 'clip_coef': 0.7}
  ours = recorded.run(tx, jnp.asarray(w), scaled, **extra)
  for (params, _), g in zip(ours, grads, strict=True):
    w = slow.step(w, prepare.prepared(g, 1.0, 0.5, 0.7))
    np.testing.assert_allclose(params, w, rtol=0.0, atol=recorded.PARAMS)


def adafactor(case, **options):
  return optax.adafactor(schedule(case), min_dim_size_to_factor=1, **options)


@pytest.mark.parametrize('name', ['defaults', 'zero_params'])
def test_adafactor_is_the_same_without_decay(name):
  recorded.assert_follows(adafactor(CASES[name], decay_rate=0.8), CASES[name])


def test_adafactor_decays_by_more():
  case = CASES['lr_schedule_wd']
  tx = adafactor(case, weight_decay_rate=case['hyper']['weight_decay'])
  with pytest.raises(AssertionError):
    recorded.assert_follows(tx, case, atol=1e-3, steps=1)


def test_state_that_adafactor_has_otherwise():
  p = jnp.ones((9, 3, 5), jnp.bfloat16)
  ours = optimizers.scale_by_adalomo().init(p)
  theirs = optax.scale_by_factored_rms(min_dim_size_to_factor=2).init(p)
  assert ours.nu_row.shape == (9, 3) and ours.nu_col.shape == (9, 5)
  assert {theirs.v_row.shape, theirs.v_col.shape} == {(9, 3), (3, 5)}
  assert ours.nu_row.dtype == jnp.float32 != theirs.v_row.dtype
  small = jnp.ones((127, 127))
  assert optax.scale_by_factored_rms().init(small).v.shape == small.shape


def test_zero_rows_beside_large_gradients_stay_finite():
  """Adafactor makes NaN of them."""
  g = jnp.zeros((4, 8)).at[1:, 2:].set(1e5)
  tx, plain = optimizers.adalomo(0.1), optax.adafactor(0.1, 1)
  updates, _ = jax.jit(tx.update)(g, tx.init(g), g)
  chex.assert_tree_all_finite(updates)
  assert np.all(updates[1:, 2:] != 0) and np.all(updates[0] == 0)
  if jax.default_backend() == 'cpu':  # which flushes what is no normal number
    updates, _ = jax.jit(plain.update)(g, plain.init(g), g)
    assert not np.isfinite(updates).all()


@pytest.mark.parametrize('size', [0.0, 1e-18, 1e18])
def test_gradients_of_any_size(size):
  g = jnp.zeros((4, 8)).at[1:, 2:].set(size)
  tx = optimizers.adalomo(0.1)
  updates, state = jax.jit(tx.update)(g, tx.init(g), jnp.ones((4, 8)))
  updates, _ = jax.jit(tx.update)(g, state, jnp.ones((4, 8)))
  chex.assert_tree_all_finite(updates)
  assert np.all(updates[1:, 2:] != 0) == (size > 0)


def test_zeros_move_by_eps2():
  """kind: derived, from the clip of U, up to float32's rounding."""
  g = jnp.asarray(np.random.default_rng(3).normal(size=(6, 9)) * 1e6)
  tx = optimizers.adalomo(0.1, clip_threshold=0.5, eps2=1e-2)
  updates, _ = tx.update(g, tx.init(g), jnp.zeros_like(g))
  moved = np.sqrt(np.mean(np.square(updates)))
  assert moved == pytest.approx(0.1 * 1e-2 * 0.5, rel=1e-5)


@pytest.mark.parametrize('shape', [(4, 5), (6, 1), (4, 5, 1, 1)])
def test_a_stack_is_its_layers(shape):
  """Both root mean squares are of one matrix."""
  rng = np.random.default_rng(1)
  scales = np.reshape([1.0, 9.0, 0.1], (3, *[1] * len(shape)))
  g, w = jnp.asarray(rng.normal(size=(2, 3, *shape)) * scales)
  tx = optimizers.adalomo(0.1, weight_decay=0.1)
  together, state = tx.update(g, tx.init(g), w)
  together, _ = tx.update(g**3, state, w)
  for i in range(3):
    apart, state = tx.update(g[i], tx.init(g[i]), w[i])
    apart, _ = tx.update(g[i] ** 3, state, w[i])
    # kind: derived, sums in another order.
    np.testing.assert_allclose(together[i], apart, rtol=1e-5)


def test_a_1x1_kernel_is_a_matrix():
  """kind: derived, sums in another order."""
  g, w = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4, 8)))
  tx = optimizers.adalomo(0.1, weight_decay=0.1)
  wide, state = g[..., None, None], tx.init(g[..., None, None])
  kernel, state = tx.update(wide, state, w[..., None, None])
  matrix, _ = tx.update(g, tx.init(g), w)
  np.testing.assert_allclose(kernel[..., 0, 0], matrix, rtol=1e-5)
  assert optax.tree.get(state, 'nu_row').shape == (4,)


@pytest.mark.parametrize(
  ('shape', 'bytes'),
  [
    ((4096, 4096), 4 * 8192 / 4096**2),
    ((3, 256, 128), 4 * 384 / (256 * 128)),
    ((256, 256, 1, 1), 4 * 512 / 256**2),
    ((4096,), 4),
  ],
)
def test_bytes(shape, bytes):
  """Exact."""
  p = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  state = jax.eval_shape(optimizers.adalomo(0.1).init, p)
  counts = 4 * sum(x.ndim == 0 for x in jax.tree.leaves(state))
  plan = memory.plan(optimizers.adalomo(0.1), p, gradients=None)
  stored = plan.total_bytes - 2 * p.size
  assert stored == bytes * p.size + counts


@pytest.mark.parametrize('max_norm', [None, 0.3])
def test_in_the_backward_pass_it_is_the_same(max_norm):
  """A layer at a time, and the whole stack at once; kind: derived.

  The biases of all layers would be one matrix: they get AdamW.
  """
  model = stacks.model()
  tx = optimizers.adalomo(
    0.03,
    weight_decay=0.1,
    mask=optimizers.hidden_matrices,
    matrices=optimizers.hidden_matrices,
    adam_learning_rate=1e-3,
  )
  fused = backward.fused_step(
    stacks.loss_fn, stacks.block_fn, tx, max_norm=max_norm
  )
  plain = tx
  if max_norm is not None:
    plain = as_official(tx, 1.0, max_norm)
  step, ordinary = jax.jit(fused), jax.jit(stacks.ordinary(plain))
  params = model.rest, model.stack
  carry = (*params, fused.init(*params))
  state, first = plain.init(params), None
  for _ in range(20):
    *carry, loss = step(*carry, *model.batch)
    params, state, _ = ordinary(params, state, *model.batch)
    first = loss if first is None else first
  # Optax's coefficient is larger by a millionth of max_norm / norm.
  close = CLOSE if max_norm is None else {'rtol': 1e-5, 'atol': 1e-5}
  chex.assert_trees_all_close(tuple(carry[:2]), params, **close)
  assert loss < 0.5 * first


def test_mask_says_what_is_decayed():
  g = {'a': jnp.ones((2, 3)), 'b': jnp.ones((2, 3))}
  zero = jax.tree.map(jnp.zeros_like, g)
  tx = optimizers.adalomo(0.1, weight_decay=0.5, mask={'a': True, 'b': False})
  updates, _ = tx.update(zero, tx.init(g), g)
  np.testing.assert_allclose(updates['a'], -0.1 * 0.5, rtol=1e-6)
  np.testing.assert_array_equal(updates['b'], 0.0)


def test_update_needs_parameters():
  g = jnp.ones((2, 3))
  tx = optimizers.scale_by_adalomo()
  with pytest.raises(ValueError, match='not passing `params`'):
    tx.update(g, tx.init(g))


@pytest.mark.parametrize(
  ('wrong', 'argument'),
  [
    ({'decay_rate': 0.8}, 'decay_rate'),
    ({'clip_threshold': 0.0}, 'clip_threshold'),
    ({'eps1': 0.0}, 'eps1'),
    ({'eps2': -1.0}, 'eps2'),
  ],
)
def test_errors_name_the_argument(wrong, argument):
  with pytest.raises(ValueError, match=f'`{argument}`.*got'):
    optimizers.scale_by_adalomo(**wrong)
