# SPDX-License-Identifier: Apache-2.0
"""Conversions under jit, on eight devices, by layers, leaf by leaf."""

import functools
import gc
import pkgutil

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from optax_mp import backward
from optax_mp import checkpoint
import quick
import states

BF16 = jnp.bfloat16
PAIRS = [('8bit', '4bit'), ('bf16-16', 'factored'), ('adamw', 'coat')]
SPECS = {'w': P('d', None), 'b': P('d')}


def conversion(old, new):
  """``convert`` of (params, state), to the dtype that the new recipe has."""
  return functools.partial(
    checkpoint.convert,
    states.tx_of(old),
    states.tx_of(new),
    dtype=states.ROWS[new].dtype,
  )


@pytest.mark.parametrize(('old', 'new'), PAIRS)
def test_under_jit(old, new):
  """Exact: the same codes, scales and parameters as without."""
  params, state = states.saved(old)
  convert = conversion(old, new)
  expected = convert(state, params)
  got = jax.jit(convert)(state, params)
  chex.assert_trees_all_equal_structs(got, expected)
  states.assert_same_bits(got, expected)


def wide_tree(dtype):
  """Tiles of 8 rows for each of eight devices."""
  params = states.tree(0, dtype)
  return {'w': jnp.tile(params['w'], (4, 1)), 'b': params['b']}


def put(params, mesh):
  return {
    name: jax.device_put(x, NamedSharding(mesh, SPECS[name]))
    for name, x in params.items()
  }


def assert_lies_like(tree, other):
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(tree),
    jax.tree.leaves(other),
    strict=True,
  ):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (path, x.sharding)


@pytest.mark.parametrize('jit', [False, True], ids=['eager', 'jit'])
@pytest.mark.parametrize(('old', 'new'), PAIRS)
def test_on_eight_devices(mesh, old, new, jit):
  """Exact: the values of one device; lies like ``new_tx.init(params)``."""
  tx, params = states.tx_of(old), wide_tree(states.ROWS[old].dtype)
  step = quick.jit(functools.partial(states.moved, tx))
  params, state = jax.device_get(step(params, tx.init(params), params))
  expected = conversion(old, new)(state, params)
  params = put(params, mesh)
  places = jax.tree.map(lambda x: x.sharding, tx.init(params))
  state = jax.device_put(state, places)
  convert = conversion(old, new)
  got = (jax.jit(convert) if jit else convert)(state, params)
  assert_lies_like(got[0], params)
  assert_lies_like(got[1], states.tx_of(new).init(got[0]))
  assert_same_numbers(got, expected)


def assert_same_numbers(got, expected):
  """kind: exact; derived for factors, sums of up to 256 values in any order."""

  def words(x):
    x = np.asarray(x)
    return x.view(f'u{x.itemsize}').astype(np.int64)

  for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
    ulps = 256 if x.ndim == 1 and x.dtype == np.float32 else 0
    assert np.all(np.abs(words(x) - words(y)) <= ulps)


@pytest.mark.parametrize('name', ['8bit', 'factored'])
def test_plain_states_on_eight_devices(mesh, name):
  """``to_optax`` and ``from_optax`` leave arrays where they belong."""
  tx, params = states.tx_of(name), put(wide_tree(BF16), mesh)
  state = tx.init(params)
  plain = checkpoint.to_optax(tx, state, params)
  assert_lies_like(plain[0].mu, params)
  assert_lies_like(plain[0].nu, params)
  assert_lies_like(checkpoint.from_optax(tx, plain, params), state)


@pytest.mark.parametrize('name', ['8bit', 'factored'])
def test_a_plain_state_from_the_host(mesh, name):
  """A restored state of plain Optax goes where the parameters are."""
  params = put(wide_tree(BF16), mesh)
  plain = optax.adamw(1e-2).init(wide_tree(jnp.float32))
  state = checkpoint.from_optax(
    states.tx_of(name), jax.device_get(plain), params
  )
  assert_lies_like(state, states.tx_of(name).init(params))


def test_layers_of_a_fused_step():
  """The parts of a FusedState are converted by themselves."""
  old, new = states.tx_of('8bit'), states.tx_of('4bit')
  rest = states.tree(0, BF16)
  stack = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), rest)

  def block(layer, h):
    return h + layer['b'].sum() + layer['w'].sum()

  def loss(rest, blocks):
    return blocks(rest['b'].sum() + rest['w'].sum()).astype(jnp.float32)

  steps = [backward.fused_step(loss, block, tx) for tx in (old, new)]
  state = steps[0].init(rest, stack)
  rest, stack, state, _ = quick.jit(steps[0])(rest, stack, state)
  convert = functools.partial(checkpoint.convert, old, new)
  rest, rest_state = convert(state.rest, rest)
  stack, stack_state = jax.vmap(convert)(state.stack, stack)
  like = steps[1].init(rest, stack)
  there = state._replace(rest=rest_state, stack=stack_state)
  chex.assert_trees_all_equal_shapes_and_dtypes(there, like)
  jax.eval_shape(steps[1], rest, stack, there)


@pytest.mark.parametrize(
  ('old', 'new'),
  [
    ('8bit', '4bit'),
    ('bf16-16', 'bf16-8'),
    ('4bit', '4bit'),
    ('adamw', '8bit'),
  ],
)
def test_one_leaf_in_float32_at_a_time(monkeypatch, old, new):
  """Exact: of twelve parameters and their moments no two are decoded at once.

  Counted are float32 arrays of their shape whenever one is about to be stored,
  beyond those that were there before.
  """
  shape, most = (48, 128), []

  def alive():
    arrays = jax.live_arrays()
    return sum(x.shape == shape and x.dtype == jnp.float32 for x in arrays)

  def watched(store):
    def call(*args, **kwargs):
      if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args)):
        most.append(alive())
      return store(*args, **kwargs)

    return call

  for name in (
    'optax_mp.formats._tree.encode_stored',
    'optax_mp.wrappers._residual.cut',
  ):
    monkeypatch.setattr(name, watched(pkgutil.resolve_name(name)))
  make = [states.ROWS[name].make() for name in (old, new)]
  x = jnp.full(shape, 0.1, states.ROWS[old].dtype)
  params = {f'w{i}': x + i for i in range(12)}
  state = make[0].init(params)
  gc.collect()
  before, most[:] = alive(), []
  checkpoint.convert(*make, state, params, dtype=BF16)
  # Twelve parameters and twice as many moments, unless they stay as they are.
  assert len(most) == {('bf16-16', 'bf16-8'): 12, ('4bit', '4bit'): 0}.get(
    (old, new), 36 if old == 'adamw' else 24
  )
  assert max(most, default=before) <= before + 1
