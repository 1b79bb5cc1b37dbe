# SPDX-License-Identifier: Apache-2.0
"""The unit of the loss does not matter where it does not matter to Optax.

Adam's updates are those of gradients of any size, but for eps. So must be what
is stored of its moments: scales are float32 and have no floor. Published codecs
keep them in float16, or above 1e-12, and lose gradients around 1e-6.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import checkpoint
from optax_mp import formats
import quick

SHAPE = (32, 128)
COUNTS = np.arange(50)
RATE = 1e-3
EPS = 1e-30  # beside the smallest gradient here, less than a rounding
# Within a block, some elements have gradients 400 times those of others.
SIZES = np.exp(np.random.default_rng(0).uniform(-3, 3, SHAPE))
ANY = [1e-8, 1e6]
POWERS = [2.0**-27, 2.0**20]


def departures(make, scales):
  """What the scale of gradients does to the weights, and what a seed does.

  Args:
    make: makes the optimizer, from a seed.
    scales: of the gradients.

  Returns:
    How far the weights are from those of the scale 1, at each of the scales;
    and how far from those of another seed, the noise of rounding.
  """

  @functools.partial(quick.jit, static_argnums=0)
  def train(seed, scale):
    tx = make(seed=seed)

    def step(carry, count):
      params, state = carry
      key = jax.random.fold_in(jax.random.key(1), count)
      gradients = SIZES * (1 + jax.random.normal(key, SHAPE)) * scale
      updates, state = tx.update(gradients, state, params)
      return (optax.apply_updates(params, updates), state), None

    params = jnp.ones(SHAPE, jnp.bfloat16)
    start = params, tx.init(params)
    return checkpoint.to_float32(*jax.lax.scan(step, start, COUNTS)[0])

  expected = train(0, 1.0)
  noise = distance(train(1, 1.0), expected)
  assert 0 < noise < np.inf
  return [distance(train(0, s), expected) for s in scales], noise


def distance(x, y):
  return np.sqrt(np.mean(np.square(np.asarray(x) - y, dtype=np.float64)))


RECIPES = {
  'adamw_8bit': optax_mp.adamw_8bit,
  'adamw_4bit': optax_mp.adamw_4bit,
  'adamw_4bit_factored': optax_mp.adamw_4bit_factored,
  'ademamix_8bit': optax_mp.ademamix_8bit,
  'coat_adamw': optax_mp.coat_adamw,
  'flash_adamw': optax_mp.flash_adamw,
  'lion_8bit': optax_mp.lion_8bit,
}


@pytest.mark.parametrize('name', RECIPES)
def test_the_scale_of_gradients_does_not_matter(name):
  """Kinds: derived, rounding to other codes; exact for powers of two."""
  eps = {} if name == 'lion_8bit' else {'eps': EPS}
  make = functools.partial(RECIPES[name], RATE, **eps)
  gone, noise = departures(make, ANY + POWERS)
  assert np.max(gone) <= noise
  assert np.max(gone[len(ANY) :]) == 0


@dataclasses.dataclass(frozen=True)
class InFloat16(formats.BlockInt):
  """Scales as FlashOptim has them."""

  def fit(self, x):
    return super().fit(x).astype(jnp.float16).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Floored(formats.BlockInt):
  """Scales as torchao has them."""

  def fit(self, x):
    return jnp.maximum(super().fit(x), 1e-12)


@pytest.mark.parametrize(
  'kind, scales, invariant',
  [
    (formats.BlockInt, ANY, True),
    (InFloat16, ANY, False),
    (Floored, ANY[:1], False),  # there is no ceiling
  ],
)
def test_scales_are_float32_without_a_floor(kind, scales, invariant):
  """What the test above can see: each of the scales is too much."""
  nu = kind(8, signed=False, map='sqrt', rounding='stochastic')

  def make(seed):
    inner = optax.adamw(RATE, eps=EPS)
    small = optax_mp.compressed(inner, {'nu': nu}, seed=seed)
    return optax_mp.compensated(small, 8, seed=seed)

  gone, noise = departures(make, scales)
  assert [bool(far <= noise) for far in gone] == [invariant] * len(scales)
