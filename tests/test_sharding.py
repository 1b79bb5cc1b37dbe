# SPDX-License-Identifier: Apache-2.0
"""On eight devices the state lies where the parameters lie, and stays there."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import formats

BF16 = jnp.bfloat16
SPECS = {
  'rows': P('d', None),
  'columns': P(None, 'd'),
  'stacked': P(None, 'd', None),
  'float32': P('d', None),
}
COLLECTIVE = re.compile(
  r'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter'
)


def stochastic():
  """Noise in the moments as well as in the parameters."""
  rule = formats.Split(8, 'stochastic')
  inner = optax.adamw(1e-2, weight_decay=0.1)
  return optax_mp.compensated(optax_mp.compressed(inner, rule, min_size=0), 0)


TRANSFORMATIONS = {
  'recipe-16': lambda: optax_mp.adamw_bf16(1e-2, min_size=0),
  'recipe-8': lambda: optax_mp.adamw_bf16(1e-2, min_size=0, residual_bits=8),
  'stochastic': stochastic,
}


def host_tree(seed):
  """Parameters, or gradients, on the host."""
  rng = np.random.default_rng(seed)
  return {
    'rows': rng.normal(size=(16, 6)).astype(BF16),
    'columns': rng.normal(size=(6, 16)).astype(BF16),
    'stacked': rng.normal(size=(3, 16, 4)).astype(BF16),
    'float32': rng.normal(size=(16, 6)).astype(np.float32),
  }


def put(tree, mesh):
  return {
    name: jax.device_put(x, NamedSharding(mesh, SPECS[name]))
    for name, x in tree.items()
  }


def make_step(tx):
  def step(params, state, gradients):
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), updates, state

  # Without optimization no product is fused with a sum. The XLA of JAX 0.12
  # fuses other ones in an eighth of an array than in the whole one.
  options = {'xla_backend_optimization_level': 0}
  return jax.jit(step, compiler_options=options)


@functools.cache
def on_one_device(name):
  """(params, updates, state) after two steps."""
  tx = TRANSFORMATIONS[name]()
  params = jax.tree.map(jnp.asarray, host_tree(0))
  state, step = tx.init(params), make_step(tx)
  params, _, state = step(params, state, host_tree(1))
  return step(params, state, host_tree(2))


def assert_like_params(state, params):
  """Every array of the state that belongs to a parameter lies like it."""
  found = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
    if not keys:
      assert leaf.size <= 2  # a counter or a key
      continue
    param = params[keys[-1]]
    assert leaf.shape == param.shape
    assert_lies_like(leaf, param)
    found += 1
  assert found >= 2 * 2 * len(params)  # two moments, high and low


def assert_lies_like(leaf, param):
  assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim)


def assert_same_bits(*trees):
  """kind: exact."""

  def view(x):
    x = np.asarray(x)
    return x.view(f'u{x.itemsize}')

  chex.assert_trees_all_equal(*(jax.tree.map(view, tree) for tree in trees))


@pytest.mark.parametrize('name', TRANSFORMATIONS)
def test_init_lies_like_params(name, mesh):
  """Eager, and under jit without a word about where its outputs go."""
  tx, params = TRANSFORMATIONS[name](), put(host_tree(0), mesh)
  eager = tx.init(params)
  assert_like_params(eager, params)
  jitted = jax.jit(tx.init)(params)
  assert_like_params(jitted, params)
  assert_same_bits(eager, jitted)


@pytest.mark.parametrize('name', TRANSFORMATIONS)
def test_update_stays_and_equals_one_device(name, mesh):
  """The same bits, noise included, without a word between the devices."""
  tx, params = TRANSFORMATIONS[name](), put(host_tree(0), mesh)
  state = tx.init(params)
  args = (params, state, put(host_tree(1), mesh))
  step = make_step(tx).lower(*args).compile()
  assert not COLLECTIVE.findall(step.as_text())
  params, _, state = step(*args)
  assert_like_params(state, params)
  # Compiled once: it would not take arguments that lie elsewhere.
  new_params, updates, state = step(params, state, put(host_tree(2), mesh))
  assert_like_params(state, params)
  for tree in (new_params, updates):
    jax.tree.map(assert_lies_like, tree, params)
  assert_same_bits((new_params, updates, state), on_one_device(name))


def test_collectives_are_recognised(mesh):
  """A sum over a sharded axis has one, so the test above can fail."""
  params = put(host_tree(0), mesh)
  compiled = jax.jit(jnp.sum).lower(params['rows']).compile()
  assert COLLECTIVE.findall(compiled.as_text())
