# SPDX-License-Identifier: Apache-2.0
"""Blocks on eight devices: the same codes, no word between devices."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import optax_mp
import quick

SHAPE = (64, 1024)  # a shard keeps whole tiles of (8, 128) along either axis
RECIPES = {
  'adamw_8bit': optax_mp.adamw_8bit,
  'adamw_4bit': optax_mp.adamw_4bit,
  'coat_adamw': optax_mp.coat_adamw,
}
# Those whose blocks do not fit into shards of (8, 128), or have no blocks.
OTHERS = {
  'adamw_4bit_factored': optax_mp.adamw_4bit_factored,
  'flash_adamw': optax_mp.flash_adamw,
  'lion_8bit': optax_mp.lion_8bit,
  'sgdm_8bit': optax_mp.sgdm_8bit,
}
COLLECTIVE = re.compile(
  r'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter'
)


def host(seed):
  rng = np.random.default_rng(seed)
  return rng.normal(size=SHAPE).astype(jnp.bfloat16)


def make_step(tx):
  def step(params, state, gradients):
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  return jax.jit(step)


def train(tx, put):
  """(parameters, state, the step) after two steps."""
  params, step = put(host(0)), make_step(tx)
  state = tx.init(params)
  for seed in (1, 2):
    params, state = step(params, state, put(host(seed)))
  return params, state, step


@functools.cache
def alone(name):
  """(parameters, state) on one device."""
  return train(RECIPES[name](1e-2), jnp.asarray)[:2]


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize('spec', [P('d', None), P(None, 'd')], ids=str)
@pytest.mark.parametrize('name', RECIPES)
def test_the_same_codes_on_eight_devices(name, spec, kind):
  """Exact: codes, scales and parameters, after two steps."""
  if jax.device_count() < 8:
    pytest.skip('needs 8 devices')
  tx = RECIPES[name](1e-2)
  expected = alone(name)
  mesh = jax.make_mesh((8,), ('d',), axis_types=(kind,))
  sharding = NamedSharding(mesh, spec)
  with jax.set_mesh(mesh):
    start = tx.init(jax.device_put(host(0), sharding))
    params, state, step = train(tx, lambda x: jax.device_put(x, sharding))
    text = step.lower(params, state, params).compile().as_text()
  for tree in (start, state):
    for leaf in jax.tree.leaves(tree):
      if leaf.ndim == 2:  # codes, scales and residual
        assert leaf.sharding.is_equivalent_to(sharding, 2)
  assert not COLLECTIVE.findall(text)
  as_words = lambda x: np.asarray(x).astype(np.float32)  # noqa: E731
  chex.assert_trees_all_equal(
    jax.tree.map(as_words, (params, state)),
    jax.tree.map(as_words, expected),
  )


@pytest.mark.parametrize(
  ('name', 'shape'),
  [(name, SHAPE) for name in RECIPES | OTHERS] + [('adamw_8bit', (64, 200))],
)
def test_a_mesh_that_no_context_sets(name, shape):
  """Exact, but for means over devices: the axes of `make_mesh` are explicit."""
  if jax.device_count() < 8:
    pytest.skip('needs 8 devices')
  tx = (RECIPES | OTHERS)[name](1e-2)
  mesh = jax.make_mesh((8,), ('d',), axis_types=(AxisType.Explicit,))
  put = lambda x: jax.device_put(x, NamedSharding(mesh, P('d', None)))  # noqa: E731
  host = np.random.default_rng(0).normal(size=(2, *shape)).astype(jnp.bfloat16)

  def one_step(put):
    params = put(host[0])
    state = tx.init(params)
    return make_step(tx)(params, state, put(host[1]))[0]

  on_eight, alone = one_step(put), one_step(jnp.asarray)
  on_eight, alone = (
    np.asarray(x).astype(np.float32) for x in (on_eight, alone)
  )
  if name == 'adamw_4bit_factored':
    chex.assert_trees_all_close(on_eight, alone, rtol=2**-7)  # one bfloat16 ulp
  else:
    chex.assert_trees_all_equal(on_eight, alone)


# A block of 128 columns is cut, one of eight rows, and a vector's.
CUT = {
  'columns': ((64, 512), P(None, 'd')),
  'rows': ((16, 128), P('d', None)),
  'vector': ((256,), P('d')),
  'stack': ((3, 64, 256), P(None, None, 'd')),
}


@pytest.mark.parametrize('name', [*RECIPES, *OTHERS, 'muon_8bit'])
def test_explicit_axes_that_cut_blocks(name):
  """kind: derived, one bfloat16 ulp. As on one device, and it stays there."""
  if jax.device_count() < 8:
    pytest.skip('needs 8 devices')
  tx = getattr(optax_mp, name)(1e-2, min_size=0)
  mesh = jax.make_mesh((8,), ('d',), axis_types=(AxisType.Explicit,))
  places = {key: NamedSharding(mesh, spec) for key, (_, spec) in CUT.items()}

  def host(seed):
    rng = np.random.default_rng(seed)
    shapes = {key: shape for key, (shape, _) in CUT.items()}
    return {
      key: rng.normal(size=s).astype(jnp.bfloat16) for key, s in shapes.items()
    }

  def one_step(put):
    params, gradients = put(host(0)), put(host(1))
    state = tx.init(params)
    updates, after = quick.jit(tx.update)(gradients, state, params)
    for x, y in zip(*map(jax.tree.leaves, (state, after)), strict=True):
      assert not x.ndim or jax.typeof(x) == jax.typeof(y)  # a loop asks for it
    return optax.apply_updates(params, updates)

  on_eight = one_step(lambda tree: jax.device_put(tree, places))
  for key, place in places.items():
    assert on_eight[key].sharding.is_equivalent_to(place, on_eight[key].ndim)
  alone = one_step(lambda tree: jax.tree.map(jnp.asarray, tree))
  widened = [
    jax.tree.map(lambda x: np.asarray(x).astype(np.float32), tree)
    for tree in (on_eight, alone)
  ]
  chex.assert_trees_all_close(*widened, rtol=2**-7)
