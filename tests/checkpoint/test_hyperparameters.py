# SPDX-License-Identifier: Apache-2.0
"""No format depends on a hyperparameter without a word.

`adamw_8bit` and others choose the map of a new first moment by its decay. A
state that is there already keeps its own map, with any decay.
"""

import inspect
import itertools

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import checkpoint
import states

DECAYS = {'b1', 'b2', 'b3', 'beta', 'adam_b1', 'adam_b2', 'momentum'}


def changed_decays():
  """Every recipe with every decay it has, changed to either side."""
  for name in optax_mp.__all__:
    recipe = getattr(optax_mp, name)
    if inspect.isfunction(recipe) and name != 'compensated':
      names = set(inspect.signature(recipe).parameters)
      if 'residual_bits' in names:
        yield from itertools.product(
          [name], sorted(names & DECAYS), (0.5, 0.99)
        )


@pytest.mark.parametrize(('name', 'decay', 'value'), [*changed_decays()])
def test_any_decay_goes_on(name, decay, value):
  """Exact: names, shapes and dtypes of the state are the old ones."""
  recipe = getattr(optax_mp, name)
  kinds = recipe(1e-2), recipe(1e-2, **{decay: value})
  params = jax.eval_shape(lambda: states.tree(0, jnp.bfloat16))
  for old, new in itertools.permutations(kinds):
    state = jax.eval_shape(old.init, params)
    _, later = jax.eval_shape(new.update, params, state, params)
    chex.assert_trees_all_equal_structs(later, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(later, state)


def adamw(b1):
  return optax_mp.adamw_8bit(states.RATE, b1=b1)


def injected(b1):
  """The decay is an array, which the program does not know.

  A recipe itself asks for a static one: a function around it does not.
  """

  return traced(optax_mp.adamw_8bit, b1)


def traced(optimizer, b1):
  def make(learning_rate, b1):
    return optimizer(learning_rate, b1=b1)

  make = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)
  return make(states.RATE, b1=b1)


def assert_next_step(tx, b1, params, state, inner):
  """Derived: float32's own step from the same moments, to 2^-15 of a weight.

  An update is that of the moments before they are stored, so that programs
  differ by the roundings of float32, and a master of 24 bits by 2^-15.
  """
  old = adamw(0.9)
  plain = checkpoint.to_optax(old, inner, params)
  weights = checkpoint.to_float32(params, inner)
  plain_tx = optax.adamw(states.RATE, b1=b1)
  if hasattr(state, 'hyperparams'):  # 1 - b1 in float32, as in the wrapped one
    plain_tx = traced(optax.adamw, b1)
    plain = plain_tx.init(weights)._replace(inner_state=plain)
  expected, _ = states.apply(plain_tx, weights, plain, 2)
  new_params, new_state = states.apply(tx, params, state, 2)
  got = checkpoint.to_float32(new_params, new_state)
  for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
    bound = 2.0**-15 * np.abs(y) + 2.0**-20 * states.RATE
    assert np.all(np.abs(x - y) <= bound)
  return new_params, new_state


@pytest.mark.parametrize(('old', 'new'), [(0.9, 0.95), (0.95, 0.9)])
def test_another_b1_goes_on_in_the_old_map(old, new):
  params, state = states.saved('8bit' if old == 0.9 else '8bit-b1')
  later = assert_next_step(adamw(new), new, params, state, state)
  chex.assert_trees_all_equal_structs(later[1], state)
  # And on: the old map is read and written, step after step.
  assert_next_step(adamw(old), old, *later, later[1])


def test_a_traced_b1():
  """A decay that is an array goes on in the map that its `init` chose."""
  params, tx = states.tree(0, jnp.bfloat16), injected(0.9)
  params, start = states.apply(tx, params, tx.init(params))
  for b1 in (0.95, 0.5):
    start.hyperparams['b1'] = jnp.float32(b1)
    _, state = assert_next_step(tx, b1, params, start, start.inner_state)
    chex.assert_trees_all_equal_structs(state, start)


def test_a_static_b1_after_a_traced_one_and_back():
  """The state inside is the same, whoever knew the decay."""
  params, tx = states.tree(0, jnp.bfloat16), injected(0.9)
  params, outer = states.apply(tx, params, tx.init(params))
  inner = outer.inner_state
  _, later = assert_next_step(adamw(0.9), 0.9, params, inner, inner)
  chex.assert_trees_all_equal_structs(later, inner)
  params, inner = states.saved('8bit')
  outer = outer._replace(inner_state=inner)
  _, later = assert_next_step(tx, 0.9, params, outer, inner)
  chex.assert_trees_all_equal_structs(later, outer)


@pytest.mark.parametrize(('old', 'new'), [(0.9, 0.95), (0.95, 0.9)])
def test_rebuild_takes_the_map_that_is_there(old, new):
  """Exact: a checkpoint goes on with another b1, without conversion."""
  params, state = states.saved('8bit' if old == 0.9 else '8bit-b1')
  data = flax.serialization.to_bytes(state)
  tree = flax.serialization.msgpack_restore(data)
  rebuilt = checkpoint.rebuild(adamw(new), params, tree)
  chex.assert_trees_all_equal_structs(rebuilt, state)
  chex.assert_trees_all_equal(rebuilt, state)
  arrays = checkpoint.to_arrays(state)
  again = checkpoint.from_arrays(adamw(new), params, arrays)
  chex.assert_trees_all_equal_structs(again, state)


def test_convert_gives_the_map_of_the_new_b1():
  params, state = states.saved('8bit')
  params, state = checkpoint.convert(adamw(0.9), adamw(0.95), state, params)
  chex.assert_trees_all_equal_structs(state, adamw(0.95).init(params))


SETTINGS = {
  'min_size': ({}, {'min_size': 1 << 20}),
  'keep_float32': ({}, {'keep_float32': 'w'}),
}


@pytest.mark.parametrize('setting', SETTINGS)
def test_settings_that_decide_which_leaves_are_stored(setting):
  """They are refused by name, in either direction."""
  kinds = [optax_mp.adamw_8bit(1e-2, **k) for k in SETTINGS[setting]]
  name = 'BlockInt_8_signed_sqrt_log_128_block_v2'
  params = states.tree(0, jnp.bfloat16)
  like = jax.eval_shape(lambda: params)
  for old, new in itertools.permutations(kinds):
    state = jax.eval_shape(old.init, like)
    with pytest.raises(ValueError, match=name) as error:
      jax.eval_shape(new.update, like, state, like)
    for word in ('0/mu/w', 'float32(16, 256)', 'checkpoint.convert'):
      assert word in str(error.value)
    # The way out that the message names.
    converted = checkpoint.convert(old, new, old.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
      converted[1], new.init(params)
    )
