# SPDX-License-Identifier: Apache-2.0
"""Blocks of values of very different sizes: Adam's steps stay steps.

Adam divides a first moment by the root of a second one. If a format makes a
large one of a first moment that is small beside others of its block, while the
second one keeps its ratio, the step has any length.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_mp
from optax_mp import formats

# Parameters are float32, so that updates are Adam's own.
pytestmark = pytest.mark.filterwarnings('ignore:.compensated. does nothing')

SHAPE = (32, 128)
STEPS, WARM_UP = 2000, 200
ARGS = {'learning_rate': 1.0, 'eps': 1e-30, 'weight_decay': 0.0}
RATIOS = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]


def steps(tx, ratio):
  """Largest and rms update of all columns but the first, whose gradients are
  larger by 1 / ratio."""
  size = jnp.where(jnp.arange(SHAPE[1]) == 0, 1.0, ratio)
  params = jnp.zeros(SHAPE)

  def step(state, i):
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), SHAPE)
    updates, state = tx.update(size * noise, state, params)
    small = updates[:, 1:]
    return state, (jnp.max(jnp.abs(small)), jnp.mean(small**2))

  run = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(STEPS)))
  _, (largest, squares) = run(tx.init(params))
  rms = jnp.sqrt(jnp.mean(squares[WARM_UP:]))
  return float(jnp.max(largest[WARM_UP:])), float(rms)


@pytest.fixture(scope='module')
def exact():
  return steps(optax.adamw(**ARGS), 1e-3)


@pytest.mark.parametrize('ratio', RATIOS)
def test_small_gradients_beside_large_ones_take_steps_of_adam(exact, ratio):
  """Derived: codes in ratios of two multiply squares by (1 + 2)^2 / 8 at most.

  An average with decay b then has up to (1 - b^2) / (1 - 9/8 b^2) times its
  variance: 2.1 for 0.9, and its steps are 1.5 times as long.
  """
  largest, rms = steps(optax_mp.adamw_8bit(**ARGS), ratio)
  assert 0.9 * exact[1] < rms < 1.5 * exact[1]
  # Claim: the largest of 7 million has a tail, but is no jump.
  assert largest < 16 * exact[0]


def test_squares_alone_jump(exact):
  """What the test above would find: the codes of the map 'sqrt'."""
  rule = {
    'mu': formats.BlockInt(8, rounding='stochastic', stochastic_below=10),
    'nu': formats.BlockInt(8, signed=False, rounding='stochastic'),
  }
  largest, rms = steps(optax_mp.compressed(optax.adamw(**ARGS), rule), 1e-6)
  assert rms > 10 * exact[1]
  assert largest > 100 * exact[0]
