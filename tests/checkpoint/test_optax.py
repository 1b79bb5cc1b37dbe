# SPDX-License-Identifier: Apache-2.0
"""To the state that plain Optax has, and back."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import checkpoint
from optax_mp import formats
import states

OURS = [name for name in states.ROWS if name != 'adamw']
ADAMW = optax.adamw(states.RATE)


@pytest.mark.parametrize('name', OURS)
def test_it_is_the_state_that_optax_has(name):
  """Exact: structure, shapes and dtypes for float32 parameters."""
  params, state = states.saved(name)
  plain = checkpoint.to_optax(states.tx_of(name), state, params)
  like = ADAMW.init(optax.tree.cast(params, jnp.float32))
  chex.assert_trees_all_equal_structs(plain, like)
  chex.assert_trees_all_equal_shapes_and_dtypes(plain, like)
  assert plain[0].count == 1
  # As optax.adamw goes on with it.
  weights = optax.tree.cast(params, jnp.float32)
  jax.eval_shape(ADAMW.update, weights, plain, weights)


def test_values():
  """Exact: 24 bits of moments that have no more than 24 bits."""
  name = 'bf16-8'
  params, state = states.saved(name)
  plain = checkpoint.to_optax(states.tx_of(name), state, params)
  kept = state.inner_state.inner_state[0].mu['w']
  like = jax.ShapeDtypeStruct(params['w'].shape, jnp.float32)
  expected = formats.Split(8).decode(kept, like)
  np.testing.assert_array_equal(plain[0].mu['w'], expected)


@pytest.mark.parametrize('name', ['bf16-16', 'bfloat16', 'float32'])
def test_there_and_back_is_exact(name):
  """Exact for formats that store again what they have stored."""
  tx = states.tx_of(name)
  params, state = states.saved(name)
  plain = checkpoint.to_optax(tx, state, params)
  back = checkpoint.from_optax(tx, plain, params)
  chex.assert_trees_all_equal_structs(back, state)
  again = checkpoint.to_optax(tx, back, params)
  if name != 'bf16-16':  # whose second moment is rounded stochastically
    plain, again = plain[0].mu, again[0].mu
  states.assert_same_bits(again, plain)
  # Residuals are those of `init`: `convert` keeps them, by `to_float32`.
  chex.assert_trees_all_equal(back.residual, tx.init(params).residual)


@pytest.mark.parametrize('name', OURS)
def test_optax_goes_on_here(name):
  """The state has the structure of `init`, and trains."""
  tx, (params, _) = states.tx_of(name), states.saved(name)
  _, plain = states.saved('adamw')
  state = checkpoint.from_optax(tx, plain, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
  jax.eval_shape(tx.update, params, state, params)
  adam = checkpoint.to_optax(tx, state, params)[0]
  chex.assert_trees_all_equal(adam.mu['b'], plain[0].mu['b'])
  assert adam.count == plain[0].count


def test_shapes_are_enough():
  """Parameters may be shapes and dtypes alone."""
  tx, (params, state) = states.tx_of('8bit'), states.saved('8bit')
  like = jax.eval_shape(lambda: params)
  plain = checkpoint.to_optax(tx, state, like)
  back = checkpoint.from_optax(tx, plain, like)
  chex.assert_trees_all_equal_structs(back, state)


def test_a_transformation_of_optax_is_itself():
  """Exact: there is nothing to take off."""
  params, state = states.saved('adamw')
  plain = checkpoint.to_optax(ADAMW, state, params)
  chex.assert_trees_all_equal_structs(plain, state)
  states.assert_same_bits(plain, state)


def test_other_optimizers():
  params, state = states.saved('8bit')
  with pytest.raises(ValueError, match='same optimizer'):
    checkpoint.from_optax(
      optax_mp.lion_8bit(1e-3), states.saved('adamw')[1], params
    )
  with pytest.raises(ValueError, match='same optimizer'):
    checkpoint.convert(
      states.tx_of('8bit'), optax_mp.sgdm_8bit(1e-3), state, params
    )


def test_states_of_other_transformations():
  params, state = states.saved('8bit')
  names = 'BlockInt_8_signed_sqrt_log.*0/mu/w.*BlockInt_4_signed_softsign'
  with pytest.raises(ValueError, match=names):
    checkpoint.to_optax(states.tx_of('4bit'), state, params)
  with pytest.raises(ValueError, match='CompensatedState.*CompressedState'):
    checkpoint.to_optax(states.tx_of('8bit'), state.inner_state, params)
  with pytest.raises(
    ValueError, match='`plain_state`.*wrap the same optimizer'
  ):
    checkpoint.from_optax(states.tx_of('8bit'), state, params)


def test_plain_states_of_other_shapes():
  plain = ADAMW.init({'w': jnp.zeros((2, 3)), 'b': jnp.zeros(40)})
  params = states.tree(0, jnp.bfloat16)
  with pytest.raises(ValueError, match=r"\(2, 3\) at '0/mu/w'.*\(16, 256\)"):
    checkpoint.from_optax(states.tx_of('8bit'), plain, params)


def test_dictionaries_are_rebuilt_first():
  params, state = states.saved('8bit')
  with pytest.raises(ValueError, match='checkpoint.rebuild'):
    checkpoint.to_optax(states.tx_of('8bit'), state._asdict(), params)
