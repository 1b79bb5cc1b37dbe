# SPDX-License-Identifier: Apache-2.0
"""Blocks of values of very different sizes: Adam's steps stay steps.

Adam divides a first moment by the root of a second one. If a format makes a
large one of a first moment that is small beside others of its block, while the
second one keeps its ratio, the step has any length.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import formats

# Parameters are float32, so that updates are Adam's own.
pytestmark = pytest.mark.filterwarnings('ignore:.compensated. does nothing')

RATIOS = 10.0 ** -np.arange(1, 7)
ROWS = 16  # of each ratio
STEPS, WARM_UP = 2000, 200
ARGS = {'learning_rate': 1.0, 'eps': 1e-30, 'weight_decay': 0.0}


def steps(tx):
  """For each ratio, the largest and the rms of updates.

  Of all columns but the first, whose gradients are larger by 1 / ratio.
  """
  shape = (len(RATIOS), ROWS, 128)
  size = np.ones(shape, np.float32)
  size[..., 1:] = RATIOS[:, None, None]
  params = jnp.zeros((len(RATIOS) * ROWS, 128))

  def step(state, i):
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), shape)
    gradients = jnp.reshape(size * noise, params.shape)
    updates, state = tx.update(gradients, state, params)
    small = jnp.reshape(updates, shape)[..., 1:]
    axes = (1, 2)
    return state, (jnp.max(jnp.abs(small), axes), jnp.mean(small**2, axes))

  run = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(STEPS)))
  _, (largest, squares) = run(tx.init(params))
  rms = np.sqrt(np.mean(squares[WARM_UP:], axis=0))
  return np.max(largest[WARM_UP:], axis=0), rms


@pytest.fixture(scope='module')
def exact():
  return steps(optax.adamw(**ARGS))


def test_small_gradients_beside_large_ones_take_steps_of_adam(exact):
  """Derived: codes in ratios of two multiply squares by (1 + 2)^2 / 8 at most.

  An average with decay b then has up to (1 - b^2) / (1 - 9/8 b^2) times its
  variance: 2.1 for 0.9, and its steps are 1.5 times as long.
  """
  largest, rms = steps(optax_mp.adamw_8bit(**ARGS))
  assert np.all(0.9 * exact[1] < rms) and np.all(rms < 1.5 * exact[1])
  # Claim: the largest of 20 million has a tail, but is no jump.
  assert np.all(largest < 32 * exact[0])


def test_squares_alone_jump(exact):
  """What the test above would find: the codes of the map 'sqrt'."""
  rule = {
    'mu': formats.BlockInt(8, rounding='stochastic', stochastic_below=10),
    'nu': formats.BlockInt(8, signed=False, rounding='stochastic'),
  }
  largest, rms = steps(optax_mp.compressed(optax.adamw(**ARGS), rule))
  assert rms[-1] > 10 * exact[1][-1]
  assert largest[-1] > 100 * exact[0][-1]


def test_four_bits_jump_as_their_docstring_says(exact):
  """Claim: gradients 100 times smaller take steps of many learning rates."""
  largest, _ = steps(optax_mp.adamw_4bit(**ARGS))
  assert largest[1] > 5 * exact[0][1]


def test_slow_averages_jump_as_their_docstring_says():
  """Claim: with a `b1` of 0.95 or more the codes are squares alone."""
  slow = ARGS | {'b1': 0.95}
  largest, _ = steps(optax_mp.adamw_8bit(**slow))
  assert largest[-1] > 5 * steps(optax.adamw(**slow))[0][-1]
