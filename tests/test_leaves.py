# SPDX-License-Identifier: Apache-2.0
"""Leaves that are no arrays of floats: as Optax, or refused by name at once."""

import dataclasses
from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import odd_trees
import optax_mp
from optax_mp import formats
import quick

pytestmark = pytest.mark.filterwarnings('ignore:`compensated` does nothing')

SPLIT = formats.Split(8)


# Any decay turns Optax's integers to the next one below.
DECAY = {'weight_decay': 0.0}
# A transformation, and the Optax optimizer that it is in float32.
PAIRS = {
  'adamw_8bit': (
    lambda: optax_mp.adamw_8bit(0.1, min_size=0, **DECAY),
    lambda: optax.adamw(0.1, **DECAY),
  ),
  'adamw_bf16': (
    lambda: optax_mp.adamw_bf16(0.1, **DECAY),
    lambda: optax.adamw(0.1, **DECAY),
  ),
  'sgdm_8bit': (
    lambda: optax_mp.sgdm_8bit(0.1, min_size=0),
    lambda: optax.sgd(0.1, momentum=0.9),
  ),
  'lion_8bit': (
    lambda: optax_mp.lion_8bit(0.1, min_size=0, **DECAY),
    lambda: optax.lion(0.1, **DECAY),
  ),
  'muon_8bit': (
    lambda: optax_mp.muon_8bit(0.1, min_size=0),
    lambda: optax.contrib.muon(0.1),
  ),
  'compressed': (
    lambda: optax_mp.compressed(optax.adam(0.1), SPLIT, min_size=0),
    lambda: optax.adam(0.1),
  ),
  'compensated': (
    lambda: optax_mp.compensated(optax.adam(0.1)),
    lambda: optax.adam(0.1),
  ),
  'came': (lambda: optax_mp.came(0.1), None),
  'apollo': (lambda: optax_mp.apollo(0.1, rank=2), None),
  'galore': (lambda: optax_mp.galore(0.1, rank=2), None),
}
PARAMS = {
  'matrix': jnp.ones((8, 128), jnp.bfloat16),
  'number': 1.5,
  'scalar': jnp.ones(()),
  'numpy': np.ones((3, 5), np.float32),
  'float64': np.ones(3),  # which JAX takes for float32
  'axes': jnp.ones((2, 1, 3, 2, 4), jnp.float16),
  'none': None,
  'integers': jnp.arange(3),
  'bools': jnp.array([True, False]),
  'empty': jnp.ones((0,), jnp.bfloat16),
  'columns': jnp.ones((5, 0)),
}
EXACT = ('integers', 'bools', 'empty', 'columns')
KEY = jax.random.key(0)


def in_float32(params):
  """The same in float32; integers stay as they are."""

  def widen(p):
    is_float = jnp.issubdtype(jnp.asarray(p).dtype, jnp.floating)
    return jnp.asarray(p, jnp.float32 if is_float else None)

  return jax.tree.map(widen, params)


def gradients(params):
  def gradient(p):
    if odd_trees.is_key(p):
      return p
    is_float = jnp.issubdtype(jnp.asarray(p).dtype, jnp.floating)
    return jnp.full_like(p, 0.5 if is_float else 0)

  return jax.tree.map(gradient, params)


def train(tx, params, steps=3):
  """The parameters and all updates after some steps, compiled as one."""

  def run(params):
    grads, state, seen = gradients(params), tx.init(params), []
    for _ in range(steps):
      updates, state = tx.update(grads, state, params)
      seen.append(updates)
      params = jax.tree.map(
        lambda p, u: p if odd_trees.is_key(p) else optax.apply_updates(p, u),
        params,
        updates,
      )
    return params, seen

  return quick.jit(run)(params)


@pytest.mark.parametrize('name', PAIRS)
def test_three_steps(name):
  """No change of dtype or shape; exact where there is nothing to train."""
  params, seen = train(PAIRS[name][0](), PARAMS)
  like = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PARAMS))
  chex.assert_trees_all_equal_shapes_and_dtypes(params, like)
  chex.assert_tree_all_finite(params)
  assert jax.tree.structure(seen[-1]) == jax.tree.structure(PARAMS)
  for key in EXACT:
    np.testing.assert_array_equal(params[key], PARAMS[key], key)


@pytest.mark.parametrize('name', [k for k, (_, base) in PAIRS.items() if base])
def test_three_steps_as_optax(name):
  """The same update, if Optax has a number for it, where nothing is trained.

  Elsewhere derived: steps are a learning rate long for equal gradients, so
  moments in 8 bits are off by up to the 3 % of their widest bin, and bfloat16
  by half its ulp. Optax's Muon divides 0 by 0 for integers.
  """
  make, plain = PAIRS[name]
  params, seen = train(make(), PARAMS)
  wide, expected = train(plain(), in_float32(PARAMS))
  for ours, theirs in zip(seen, expected, strict=True):
    for key in EXACT:
      if np.all(np.isfinite(theirs[key])):
        np.testing.assert_array_equal(ours[key], theirs[key], key)
  for key in set(wide) - set(EXACT) - {'none'}:
    np.testing.assert_allclose(
      *(np.asarray(tree[key], np.float32) for tree in (params, wide)),
      rtol=2**-8,
      atol=0.03 * 3 * 0.1,
      err_msg=key,
    )


@pytest.mark.parametrize('name', PAIRS)
def test_python_numbers_and_numpy_arrays_outside_of_jit(name):
  params = {'number': 1.5, 'numpy': np.ones((3, 5), np.float32), 'int': 2}
  tx = PAIRS[name][0]()
  state = tx.init(params)
  updates, state = tx.update({**params, 'int': 0}, state, params)
  assert optax.apply_updates(params, updates)['number'] < 1.5
  assert optax_mp.memory.plan(tx, params).num_params == 17


@pytest.mark.parametrize('name', ['adamw_8bit', 'compressed', 'came'])
def test_python_numbers_and_numpy_arrays_elsewhere(name):
  """Shardings and checkpoints of such a tree are those of the same arrays."""
  params = {'number': 1.5, 'wide': np.ones((3, 5)), 'int': 2, 'none': None}
  arrays = jax.tree.map(jnp.asarray, params)
  tx = PAIRS[name][0]()
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  chex.assert_trees_all_equal_structs(
    *(optax_mp.state_shardings(tx, p, here) for p in (params, arrays))
  )
  state = tx.init(params)
  chex.assert_trees_all_equal(state, tx.init(arrays))
  checkpoint = optax_mp.checkpoint
  whole = checkpoint.to_float32(params, state)
  chex.assert_trees_all_equal(whole, checkpoint.to_float32(arrays, state))
  chex.assert_trees_all_equal(
    *(checkpoint.from_float32(tx, p, jnp.float32) for p in (params, arrays))
  )
  chex.assert_trees_all_equal(
    *(checkpoint.convert(tx, tx, state, p) for p in (params, arrays))
  )


@pytest.mark.parametrize('name', PAIRS)
@pytest.mark.parametrize('keyed', [False, True], ids=['', 'key'])
def test_checkpoints_have_a_place_for_each(name, keyed):
  """Whatever way a state takes, it comes back in the same shapes."""
  params, tx = PARAMS, PAIRS[name][0]()
  if keyed:
    params, tx = {**PARAMS, 'key': KEY}, odd_trees.frozen(tx)
  checkpoint = optax_mp.checkpoint

  def ways():
    state = tx.init(params)
    plain = checkpoint.to_optax(tx, state, params)
    dicts = flax.serialization.to_state_dict(state)
    return state, [
      checkpoint.from_optax(tx, plain, params),
      checkpoint.convert(tx, tx, state, params)[1],
      checkpoint.rebuild(tx, params, dicts),
    ]

  state, others = jax.eval_shape(ways)
  for other in others:
    chex.assert_trees_all_equal_shapes_and_dtypes(other, state)


@pytest.mark.parametrize('name', ['adamw_8bit', 'galore'])
def test_arrays_of_an_unusual_tree(name):
  tx = PAIRS[name][0]()
  state = tx.init(PARAMS)
  arrays = optax_mp.checkpoint.to_arrays(state)
  back = optax_mp.checkpoint.from_arrays(tx, PARAMS, arrays)
  chex.assert_trees_all_equal(back, state)


@pytest.mark.parametrize('name', PAIRS)
def test_keys_that_are_frozen(name):
  params = {'matrix': PARAMS['matrix'], 'key': KEY}
  tx = odd_trees.frozen(PAIRS[name][0]())
  trained, _ = train(tx, params)
  assert jnp.array_equal(trained['key'], KEY)
  assert np.all(trained['matrix'] < 1)
  bare = optax_mp.memory.plan(PAIRS[name][0](), {'matrix': params['matrix']})
  assert optax_mp.memory.plan(tx, params).total_bytes == bare.total_bytes + 8


@pytest.mark.parametrize('bits', [16, 0])
def test_keys_that_are_frozen_inside(bits):
  params = {'matrix': PARAMS['matrix'], 'key': KEY}
  inner = odd_trees.frozen(optax.adam(0.1))
  tx = optax_mp.compensated(optax_mp.compressed(inner, SPLIT, min_size=0), bits)
  trained, _ = train(tx, params)
  assert np.all(trained['matrix'] < 1)


def _traced(tx, params, grads):
  return jax.eval_shape(lambda: tx.update(grads, tx.init(params), params))


@pytest.mark.parametrize('name', PAIRS)
def test_keys_that_nobody_freezes(name):
  params = {'matrix': PARAMS['matrix'], 'key': KEY}
  with pytest.raises(ValueError, match=r"`(params|updates)` has.*'key'"):
    _traced(PAIRS[name][0](), params, params)


@pytest.mark.parametrize('name', PAIRS)
def test_a_parameter_without_a_gradient(name):
  params = {'matrix': PARAMS['matrix'], 'layer': {'bias': jnp.ones(3)}}
  tx = PAIRS[name][0]()
  for missing in ({'bias': None}, None):
    grads = {'matrix': params['matrix'], 'layer': missing}
    with pytest.raises(ValueError, match="`updates` has no gradient at 'layer"):
      _traced(tx, params, grads)


@pytest.mark.parametrize('name', ['compressed', 'came', 'apollo'])
def test_a_missing_gradient_without_parameters(name):
  params = {'matrix': PARAMS['matrix'], 'bias': jnp.ones(3)}
  tx = PAIRS[name][0]()
  grads = {**params, 'bias': None}
  with pytest.raises(ValueError, match=r"`updates` has.*'bias'"):
    jax.eval_shape(lambda: tx.update(grads, tx.init(params)))


@pytest.mark.parametrize('name', PAIRS)
def test_a_gradient_of_another_shape(name):
  """One that would broadcast, too."""
  params = {'matrix': PARAMS['matrix']}
  grads = {'matrix': jnp.ones((1, 128))}
  with pytest.raises(ValueError, match=r'`updates` has the shape \(1, 128\)'):
    _traced(PAIRS[name][0](), params, grads)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
  """As Equinox makes them: what is no array is a leaf all the same."""

  weight: Any
  activation: Any


@pytest.mark.parametrize('name', PAIRS)
@pytest.mark.parametrize(
  'leaf',
  [jax.nn.relu, 'relu', np.array(['a']), np.array([None]), object()],
  ids=['function', 'string', 'strings', 'objects', 'object'],
)
def test_unfiltered_modules(name, leaf):
  model, tx = Module(PARAMS['matrix'], leaf), PAIRS[name][0]()
  for use in (tx.init, lambda model: optax_mp.memory.plan(tx, model)):
    with pytest.raises(ValueError, match="`params`.*'activation'.*equinox"):
      use(model)


@pytest.mark.parametrize('name', PAIRS)
def test_float0_gradients_of_integers(name):
  """As ``jax.grad(..., allow_int=True)`` gives them: nobody can train these."""
  params = {'matrix': PARAMS['matrix'], 'integers': jnp.arange(3)}
  grads = {**params, 'integers': np.zeros(3, jax.dtypes.float0)}
  with pytest.raises(ValueError, match="`updates` has.*'integers'"):
    _traced(PAIRS[name][0](), params, grads)


@pytest.mark.parametrize('name', PAIRS)
@pytest.mark.parametrize('dtype', [jnp.int32, jnp.bool], ids=['int', 'bool'])
def test_float_gradients_of_integers(name, dtype):
  """A state keeps the dtypes that it had in ``init``, as the parameters do."""
  params = {'matrix': PARAMS['matrix'], 'mask': jnp.ones(3, dtype)}
  grads = jax.tree.map(lambda p: jnp.zeros(p.shape), params)
  tx = PAIRS[name][0]()

  def step(state, params):
    updates, state = tx.update(grads, state, params)
    return state, optax.apply_updates(params, updates)

  state = jax.eval_shape(tx.init, params)
  carry = (state, params)
  for _ in range(3):
    carry = jax.eval_shape(step, *carry)
  chex.assert_trees_all_equal_shapes_and_dtypes(carry, (state, params))


@pytest.mark.parametrize('wrap', [optax_mp.compensated, None])
def test_muon_of_an_empty_matrix(wrap):
  """Optax divides by its sides."""
  inner = optax.contrib.muon(0.1)
  tx = optax_mp.muon_8bit(0.1) if wrap is None else wrap(inner)
  params = {'matrix': PARAMS['matrix'], 'empty': jnp.ones((0, 5))}
  with pytest.raises(ZeroDivisionError):
    _traced(inner, params, params)
  with pytest.raises(ValueError, match=r"'empty'.*\(0, 5\).*ZeroDivision"):
    _traced(tx, params, params)


@pytest.mark.parametrize(
  'format',
  [
    SPLIT,
    formats.BlockInt(8),
    formats.BlockInt(8, scale='rank1'),
    formats.Float8(),
    formats.Affine(),
    formats.ErrorFeedback(formats.BlockInt(8), formats.BlockInt(4)),
  ],
  ids=lambda format: type(format).__name__,
)
@pytest.mark.parametrize('shape', [(0,), (0, 5), (5, 0), (2, 0, 128), (8, 0)])
def test_empty_arrays_are_stored_as_nothing(format, shape):
  x = {'empty': jnp.zeros(shape), 'scalar': 1.5}
  stored = formats.encode_tree(x, format)
  back = formats.decode_tree(stored, jax.tree.map(jnp.asarray, x), format)
  assert back['empty'].shape == shape
  assert formats.bits_per_value(format, shape) == 0
  plan = optax_mp.memory.plan(
    optax_mp.compressed(optax.trace(0.9), format, min_size=0), x['empty']
  )
  assert plan.leaves[0].note in ('', 'by the rule')
