# SPDX-License-Identifier: Apache-2.0
"""The small examples train, each in the loop of its library."""

import importlib

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backward_linen
import digits
import digits_nnx
import float16_loss_scale
import optax_mp

LOOPS = {
  'digits_linen': (),
  'digits_nnx': (),
  'equinox_mlp': ('equinox',),
  'haiku_mlp': ('haiku',),
  'float16_loss_scale': (),
}


@pytest.mark.parametrize('name', LOOPS)
def test_digits(name, capsys):
  """Claim: over 95 % of the test images."""
  for library in LOOPS[name]:
    pytest.importorskip(library)
  reached = importlib.import_module(name).main()
  printed = capsys.readouterr().out
  assert 'total' in printed and f'test accuracy {reached:.4f}' in printed
  assert reached > 0.95


def _dtypes(tree):
  return {str(x.dtype) for x in jax.tree.leaves(tree)}


def test_nnx_casts_parameters_alone():
  """Batch statistics stay float32, and both stay so in a step."""
  data = digits.load(8, 8, 1)
  model = digits_nnx.CNN(nnx.Rngs(0))
  digits_nnx.to_bfloat16(model)
  optimizer = nnx.Optimizer(model, digits_nnx.tx, wrt=nnx.Param)
  for batch in list(digits.batches(data, 64))[:2]:
    digits_nnx.train_step(model, optimizer, *batch)
    assert _dtypes(nnx.state(model, nnx.Param)) == {'bfloat16'}
    assert _dtypes(nnx.state(model, nnx.BatchStat)) == {'float32'}


def test_equinox_casts_arrays_alone():
  """A step keeps dtypes, where `eqx.apply_updates` would not."""
  eqx = pytest.importorskip('equinox')
  equinox_mlp = importlib.import_module('equinox_mlp')

  class Model(eqx.Module):
    mlp: eqx.nn.MLP
    key: jax.Array
    count: jax.Array

    def __call__(self, x):
      return self.mlp(x)

  key = jax.random.key(0)
  mlp = eqx.nn.MLP(64, 10, width_size=32, depth=1, key=key)
  model = optax_mp.cast(Model(mlp, key, jnp.int32(3)))
  opt_state = equinox_mlp.tx.init(eqx.filter(model, eqx.is_inexact_array))
  for batch in list(digits.batches(digits.load(64), 64))[:2]:
    model, opt_state, _ = equinox_mlp.train_step(batch, model, opt_state)
    assert _dtypes(eqx.filter(model.mlp, eqx.is_array)) == {'bfloat16'}
  assert model.count == 3 and jnp.issubdtype(
    model.key.dtype, jax.dtypes.prng_key
  )


def test_haiku_stays_in_bfloat16():
  pytest.importorskip('haiku')
  haiku_mlp = importlib.import_module('haiku_mlp')

  data = digits.load(64)
  params = haiku_mlp.network.init(jax.random.key(0), data.images[:1])
  params = optax_mp.cast(params)
  opt_state = haiku_mlp.tx.init(params)
  for batch in list(digits.batches(data, 64))[:2]:
    params, opt_state, _ = haiku_mlp.train_step(params, opt_state, *batch)
    assert _dtypes(params) == {'bfloat16'}


def test_a_skipped_float16_step_changes_the_scale_alone():
  """Exact, and the scale grows again after as many steps as it says."""
  module = float16_loss_scale
  images, labels = next(digits.batches(digits.load(64), 64))
  state = module.create()
  before = jax.tree.map(np.asarray, state)
  state, _ = module.train_step(state, np.full_like(images, np.inf), labels)
  chex.assert_trees_all_equal(state.params, before.params)
  chex.assert_trees_all_equal(state.opt_state, before.opt_state)
  assert state.scale.scale == before.scale.scale / 2 and state.skipped == 1
  assert _dtypes(state.params) == {'float16'}
  small = state.scale.replace(scale=jnp.float32(2.0**8))
  state = state._replace(scale=small)
  for _ in range(51):
    state, loss = module.train_step(state, images, labels)
  assert state.skipped == 1 and np.isfinite(loss)
  assert state.scale.scale == 2.0**9
  assert _dtypes(state.params) == {'float16'}


def test_an_epoch_has_each_image_once():
  data = digits.load(64)
  assert len(data.images) == 1437 and len(data.test_images) == 360
  first, again, other = (
    np.concatenate([labels for _, labels in digits.batches(data, 1, seed)])
    for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()
  np.testing.assert_array_equal(np.sort(other), np.sort(data.labels))


@pytest.mark.parametrize('half', ['bfloat16', 'float16'])
def test_a_linen_stack_in_the_backward_pass(half, capsys):
  """Claim: over 85 % after a few epochs; the first scales are too large."""
  assert backward_linen.main(['--half', half, '--epochs', '6']) > 0.85
  skipped = int(capsys.readouterr().out.split()[-2])
  assert (skipped > 0) == (half == 'float16')
