# SPDX-License-Identifier: Apache-2.0
"""Clipping, skipped steps and scaled losses."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import backward
import quick
import stacks

CLOSE = {'rtol': 1e-6, 'atol': 1e-7}  # derived: 8 float32 ulps
NORM = 0.3


def fused(tx, **options):
  return backward.fused_step(stacks.loss_fn, stacks.block_fn, tx, **options)


def adamw():
  return optax.adamw(1e-2, weight_decay=0.1)


def start(step, dtype=jnp.float32):
  model = stacks.model(dtype)
  return (model.rest, model.stack, step.init(model.rest, model.stack)), model


def test_exact_clips_like_optax():
  """Some steps are clipped, some are not.

  kind: derived: parameters as elsewhere; the loss ends near 0, where an ulp of
  a logit counts for more.
  """
  step = fused(adamw(), max_norm=NORM)
  carry, model = start(step)
  tx = optax.chain(optax.clip_by_global_norm(NORM), adamw())
  params = carry[:2]
  state, norms = tx.init(params), []
  train, train_ordinary = quick.jit(step), quick.jit(stacks.ordinary(tx))
  gradients = quick.jit(jax.grad(stacks.plain_loss))
  for _ in range(50):
    norms.append(optax.tree.norm(gradients(params, *model.batch)))
    *carry, loss = train(*carry, *model.batch)
    params, state, expected_loss = train_ordinary(params, state, *model.batch)
    np.testing.assert_allclose(carry[2].last_norm, norms[-1], rtol=1e-4)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-4)
  assert max(norms) > NORM > min(norms)
  chex.assert_trees_all_close(tuple(carry[:2]), params, **CLOSE)


def test_previous_clips_by_the_norm_of_the_last_step():
  """Against gradients scaled by hand; the first is not clipped."""
  step = fused(optax.sgd(0.5), max_norm=NORM, norm_mode='previous')
  carry, model = start(step)
  params, last = carry[:2], 0.0
  train = quick.jit(step)
  gradients_of = quick.jit(jax.grad(stacks.plain_loss))
  for i in range(8):
    gradients = gradients_of(params, *model.batch)
    factor = 1.0 if last < NORM else NORM / last
    assert (factor < 1) == (0 < i < 7) or i == 7
    params = jax.tree.map(
      lambda p, g, f=factor: p - 0.5 * f * g, params, gradients
    )
    last = float(optax.tree.norm(gradients))
    *carry, _ = train(*carry, *model.batch)
    np.testing.assert_allclose(carry[2].last_norm, last, rtol=1e-5)
    chex.assert_trees_all_close(tuple(carry[:2]), params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  'bad, options',
  [
    (np.nan, {}),
    (-np.inf, {'max_norm': NORM}),
    (1e20, {}),
    (1e20, {'max_norm': NORM}),  # an infinite norm would clip all to 0
    (1e20, {'max_norm': 1e30, 'norm_mode': 'previous'}),
  ],
)
def test_a_gradient_that_is_not_finite_changes_nothing(bad, options):
  """Exact: one number of one layer is enough, and the next step goes on.

  1e20 is finite in bfloat16, and the average of its square is not.
  """

  @jax.custom_vjp
  def spoil(w, how):
    return w

  def spoil_bwd(how, g):
    return g.at[0, 0].add(how.astype(g.dtype)), None

  spoil.defvjp(lambda w, how: (w, how), spoil_bwd)

  def block_fn(p, h, how):
    return stacks.block_fn(p | {'kernel': spoil(p['kernel'], how)}, h)

  def loss_fn(rest, blocks, x, y, how):
    return stacks.loss_fn(rest, lambda h: blocks(h, scanned=(how,)), x, y)

  tx = optax_mp.adamw_8bit(1e-2, min_size=0)
  step = backward.fused_step(
    loss_fn, block_fn, tx, skip_nonfinite=True, **options
  )
  carry, model = start(step, jnp.bfloat16)
  train = quick.jit(step)
  fine = jnp.zeros(stacks.LAYERS)
  carry = train(*carry, *model.batch, fine)[:3]
  *after, loss = train(*carry, *model.batch, fine.at[1].set(bad))
  assert np.isfinite(loss)
  skipped = carry[2]._replace(total_notfinite=carry[2].total_notfinite + 1)
  chex.assert_trees_all_equal(tuple(after), (*carry[:2], skipped))
  *later, _ = train(*after, *model.batch, fine)
  expected = train(*carry, *model.batch, fine)[:3]
  chex.assert_trees_all_equal(tuple(later[:2]), expected[:2])
  assert later[2].total_notfinite == 1
  assert np.any(later[1]['kernel'] != carry[1]['kernel'])


def test_a_gradient_of_the_rest_that_is_not_finite_changes_nothing():
  """Exact: all of the layers are finite then."""

  def loss_fn(rest, blocks, x, y, root):
    loss = stacks.loss_fn(rest, blocks, x, y)
    # The root of 0 is 0, and has no derivative.
    return loss + jnp.sum(jnp.sqrt(root * rest['out'] ** 2))

  step = backward.fused_step(
    loss_fn, stacks.block_fn, adamw(), skip_nonfinite=True
  )
  carry, model = start(step)
  *after, loss = quick.jit(step)(*carry, *model.batch, 0.0)
  assert np.isfinite(loss)
  skipped = carry[2]._replace(total_notfinite=carry[2].total_notfinite + 1)
  chex.assert_trees_all_equal(tuple(after), (*carry[:2], skipped))


def test_a_state_of_the_rest_that_overflows_changes_nothing():
  """Exact: of gradients that are finite."""

  def loss_fn(rest, blocks, x, y, slope):
    return stacks.loss_fn(rest, blocks, x, y) + slope * jnp.sum(rest['out'])

  step = backward.fused_step(
    loss_fn, stacks.block_fn, adamw(), skip_nonfinite=True
  )
  carry, model = start(step)
  train = quick.jit(step)
  *after, loss = train(*carry, *model.batch, 1e20)
  assert np.isfinite(loss)
  skipped = carry[2]._replace(total_notfinite=carry[2].total_notfinite + 1)
  chex.assert_trees_all_equal(tuple(after), (*carry[:2], skipped))
  *after, _ = train(*carry, *model.batch, 1.0)
  assert not after[2].total_notfinite


def test_a_norm_that_is_not_finite_is_not_kept():
  """Else 'previous' would clip everything away from then on."""
  step = fused(optax.sgd(0.0), max_norm=NORM, norm_mode='previous')
  carry, model = start(step)
  train = quick.jit(step)
  carry = train(*carry, *model.batch)[:3]
  norm = carry[2].last_norm
  assert norm > 0
  *_, state, _ = train(*carry, *model.batch, loss_scale=jnp.inf)
  assert state.last_norm == norm


@pytest.mark.parametrize('options', [{}, {'max_norm': NORM}], ids=str)
def test_a_scaled_loss_trains_like_another(options):
  """Exact for a power of two: the loss, and what is learned of it."""
  step = fused(adamw(), **options)
  carry, model = start(step)
  train = quick.jit(step)
  *plain, loss = train(*carry, *model.batch)
  *scaled, scaled_loss = train(*carry, *model.batch, loss_scale=2.0**12)
  assert loss == scaled_loss
  chex.assert_trees_all_close(tuple(scaled), tuple(plain), **CLOSE)


def test_what_float16_would_lose_reaches_the_optimizer():
  """Claim: gradients of 1e-9 move float16 weights with a scale, not without."""
  tx = optax_mp.compensated(optax.adam(1e-3, eps=1e-15))

  def loss_fn(rest, blocks, x):
    return jnp.sum((blocks(x) * rest['w']).astype(jnp.float32) * 1e-9)

  def block_fn(p, h):
    return h + p['w']

  step = backward.fused_step(loss_fn, block_fn, tx)
  rest = {'w': jnp.ones((4,), jnp.float16)}
  stack = {'w': jnp.ones((2, 4), jnp.float16)}
  args = (rest, stack, step.init(rest, stack), jnp.ones((4,), jnp.float16))
  masters = []
  for scale in (None, 2.0**14):
    _, new, state, _ = quick.jit(step)(*args, loss_scale=scale)
    masters.append(optax_mp.checkpoint.to_float32(new, state.stack)['w'])
  np.testing.assert_array_equal(masters[0], 1)
  np.testing.assert_allclose(masters[1], 1 - 1e-3, rtol=1e-6)
