# SPDX-License-Identifier: Apache-2.0
"""Nothing stalls: weights move and averages decay, which bfloat16's do not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import checkpoint
from optax_mp import formats

ONES, ZEROS = 300, 3000


def _train(tx, params, grads):
  """The parameters after each of the gradients."""

  def step(carry, grad):
    params, state = carry
    grad = jnp.full(params.shape, grad, params.dtype)
    updates, state = tx.update(grad, state, params)
    return (optax.apply_updates(params, updates), state), None

  run = jax.jit(lambda carry: jax.lax.scan(step, carry, grads)[0])
  return run((params, tx.init(params)))


def _nu(state):
  """The second moment, in float32."""
  (nu,) = [v for k, v in optax.tree.get_all_with_path(state, 'nu')]
  if formats.is_stored(nu):
    return SPLIT.decode(nu, jax.ShapeDtypeStruct(nu.high.shape, jnp.float32))
  return nu.astype(jnp.float32)


SPLIT = formats.Split(8)
GOOD = {
  'split-16': formats.Split(16),
  'split-8': SPLIT,
  'bfloat16-stochastic': formats.BFloat16('stochastic'),
}


@pytest.mark.parametrize('name', GOOD)
def test_second_moment_rises_and_decays(name):
  """Claim: within 10 % of the true average, after ones and after zeros.

  For stochastic rounding of the mean over the values, whose noise is 5 % each.
  """
  inner = optax.scale_by_adam(b2=0.999)
  tx = optax_mp.compressed(inner, GOOD[name], min_size=0)
  params = jnp.zeros(1000)
  for zeros in (0, ZEROS):
    grads = jnp.concatenate([jnp.ones(ONES), jnp.zeros(zeros)])
    _, state = _train(tx, params, grads)
    (nu,) = [v for _, v in optax.tree.get_all_with_path(state, 'nu')]
    got = GOOD[name].decode(nu, jax.ShapeDtypeStruct((1000,), jnp.float32))
    want = (1 - 0.999**ONES) * 0.999**zeros
    np.testing.assert_allclose(got.mean(), want, rtol=0.1)


def test_second_moment_in_bfloat16_stalls():
  """What the formats above are for: with plain Optax neither holds."""
  params = jnp.zeros(10, jnp.bfloat16)
  tx = optax.scale_by_adam(b2=0.999)
  _, risen = _train(tx, params, jnp.ones(ONES))
  _, fallen = _train(
    tx, params, jnp.concatenate([jnp.ones(ONES), jnp.zeros(ZEROS)])
  )
  true = 1 - 0.999**ONES
  assert np.all(np.abs(_nu(risen) - true) > 0.1 * true)
  assert np.all(_nu(fallen) == _nu(risen))  # 3000 zeros, and not one bit less


def test_second_moment_stored_in_nearest_bfloat16_stalls():
  """Computing in float32 is not enough: what is stored must not stall."""
  tx = optax_mp.compressed(
    optax.scale_by_adam(b2=0.999), formats.BFloat16(), min_size=0
  )
  _, state = _train(
    tx, jnp.zeros(10), jnp.concatenate([jnp.ones(ONES), jnp.zeros(ZEROS)])
  )
  true = (1 - 0.999**ONES) * 0.999**ZEROS
  assert np.all(_nu(state) > 2 * true)


@pytest.mark.parametrize('bits', [16, 8, 0])
@pytest.mark.parametrize('lr', [1e-3, 1e-5])
def test_a_weight_of_one_moves(bits, lr):
  """Derived: 200 steps of adamw at lr move it by 200 lr, less the decay.

  8 and 0 bits are rounded stochastically: the mean over the weights, 5 sigma of
  a walk with 200 steps of at most one place.
  """
  tx = optax_mp.compensated(optax.adamw(lr, weight_decay=0.0), bits)
  params, state = _train(tx, jnp.ones(4096, jnp.bfloat16), jnp.ones(200))
  moved = 1 - np.asarray(checkpoint.to_float32(params, state), np.float64)
  place = {16: 2.0**-23, 8: 2.0**-16, 0: 2.0**-8}[bits]
  sigma = place * np.sqrt(200 / 4096)
  rounding = 200 * 2.0**-24  # of each float32 step
  np.testing.assert_allclose(
    moved.mean(), 200 * lr, atol=5 * sigma + rounding, rtol=1e-4
  )


def test_a_weight_of_one_does_not_move_in_plain_bfloat16():
  params, _ = _train(
    optax.adamw(1e-3), jnp.ones(10, jnp.bfloat16), jnp.ones(200)
  )
  assert np.all(params == 1)


@pytest.mark.parametrize('bits', [16, 8])
def test_weight_decay_alone_is_followed(bits):
  """Derived: (1 - lr decay)^t, within one place of the master a step."""
  steps, decay = 1000, 1e-3
  tx = optax_mp.compensated(
    optax.adamw(1.0, weight_decay=decay), residual_bits=bits
  )
  start = jnp.asarray(np.linspace(0.5, 2, 1000), jnp.bfloat16)
  params, state = _train(tx, start, jnp.zeros(steps))
  got = np.asarray(checkpoint.to_float32(params, state), np.float64)
  want = np.asarray(start, np.float64) * (1 - decay) ** steps
  place = 2.0**-24 if bits == 16 else 2.0**-15
  # 16 bits: rounding to nearest. 8: random signs add up like their root.
  bound = steps * 2 * place if bits == 16 else 6 * np.sqrt(steps) * place
  np.testing.assert_allclose(got, want, rtol=bound)


def test_weight_decay_alone_does_nothing_in_plain_bfloat16():
  start = jnp.asarray(np.linspace(0.5, 2, 100), jnp.bfloat16)
  params, _ = _train(
    optax.adamw(1.0, weight_decay=1e-3), start, jnp.zeros(1000)
  )
  assert np.all(params == start)


# Muon and Lion divide by what is left, AdEMAMix never ends: in float32 as well.
DYING = (
  'adamw_8bit',
  'adamw_4bit',
  'adamw_4bit_factored',
  'coat_adamw',
  'flash_adamw',
  'sgdm_8bit',
)


def _move_of_dead_columns(tx, dtype, until=200, steps=900):
  """How far weights move after their gradients have ended, others' have not."""
  shape = (32, 128)
  dead = np.indices(shape)[1] % 2 == 1

  def step(carry, t):
    params, state = carry
    key = jax.random.fold_in(jax.random.key(0), t)
    grads = 0.1 + jax.random.normal(key, shape)
    grads = jnp.where(dead & (t >= until), 0.0, grads).astype(dtype)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), params[:, 1::2]

  params = jnp.ones(shape, dtype)
  run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps))[1])
  trace = np.asarray(run((params, tx.init(params))), np.float32)
  return np.abs(trace[until:] - trace[until]).max()


@pytest.mark.parametrize('name', DYING)
def test_weights_whose_gradients_end_come_to_rest(name):
  """Claim: after at most five times the way of float32's.

  First moments that stand still, over second moments that do not, would drive
  them away without end.
  """
  settings: dict[str, Any] = {'b2': 0.95, 'weight_decay': 0.0}
  exact = optax.adamw(1e-3, **settings)
  if name == 'sgdm_8bit':
    settings, exact = {}, optax.sgd(1e-3, momentum=0.9)
  moved = _move_of_dead_columns(
    getattr(optax_mp, name)(1e-3, **settings), jnp.bfloat16
  )
  assert moved <= 5 * _move_of_dead_columns(exact, jnp.float32)


def test_weights_whose_first_moments_stand_still_do_not():
  """Claim, which the test above can see: to nearest they go ever farther."""
  nearest = {
    'mu': formats.BlockInt(8),
    'nu': formats.BlockInt(8, signed=False, rounding='stochastic'),
  }
  inner = optax.adamw(1e-3, b2=0.95, weight_decay=0.0)
  tx = optax_mp.compressed(inner, nearest)
  assert _move_of_dead_columns(tx, jnp.float32) > 1.0
