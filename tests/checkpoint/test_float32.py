# SPDX-License-Identifier: Apache-2.0
"""Float32 parameters out of a training run, and into a fresh one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import checkpoint
from optax_mp import formats


def _weights():
  rng = np.random.default_rng(0)
  return {
    'embed': jnp.asarray(rng.normal(size=(16, 8)), jnp.float32),
    'head': jnp.asarray(rng.normal(size=(8, 4)), jnp.float32),
    'steps': jnp.arange(3),
  }


def _labels(params):
  return {k: 'frozen' if k == 'steps' else k for k in params}


def _partition(embed, head):
  groups = {'embed': embed, 'head': head, 'frozen': optax.set_to_zero()}
  return optax.partition(groups, _labels)


SGD = optax.sgd(1e-3)
TRANSFORMS = {
  'alone': optax_mp.compensated(SGD),
  'in-chain': optax.chain(optax.clip(1.0), optax_mp.compensated(SGD)),
  'in-partition': _partition(
    optax_mp.compensated(SGD), optax_mp.compensated(optax.adam(1e-3))
  ),
  'in-multi-steps': optax.MultiSteps(
    optax_mp.compensated(SGD), 2
  ).gradient_transformation(),
}


@pytest.mark.parametrize('name', TRANSFORMS)
def test_a_fresh_optimizer_keeps_the_low_bits(name):
  """Exact: every bit of a float32 checkpoint, through 16 residual bits."""
  weights = _weights()
  params, state = checkpoint.from_float32(TRANSFORMS[name], weights)
  assert params['embed'].dtype == params['head'].dtype == jnp.bfloat16
  chex.assert_trees_all_equal(checkpoint.to_float32(params, state), weights)
  chex.assert_trees_all_equal_shapes_and_dtypes(
    state, TRANSFORMS[name].init(params)
  )


def test_the_parameters_are_those_of_training():
  """Exact: the visible half is the format's, whose ties go away from zero."""
  tie = jnp.array([1.00390625])  # halfway between two bfloat16 numbers
  params, _ = checkpoint.from_float32(TRANSFORMS['alone'], tie)
  assert params == jnp.array([1.0078125], jnp.bfloat16)
  assert tie.astype(jnp.bfloat16) == 1.0


def test_the_inner_state_starts_from_the_float32_weights():
  """Exact: for an inner state that copies the parameters."""
  tx = optax_mp.compensated(
    optax.contrib.schedule_free(SGD, learning_rate=1e-3)
  )
  weights = {'w': jnp.array([0.1, 0.2])}
  _, state = checkpoint.from_float32(tx, weights)
  chex.assert_trees_all_equal(state.inner_state.z, weights)


def test_eight_bits_and_none():
  """Derived: 16 significant bits to nearest, 2^-16; none, those of bfloat16."""
  weights = _weights()['embed']
  for bits, bound in ((8, 2.0**-16), (0, 2.0**-8)):
    tx = optax_mp.compensated(SGD, bits)
    params, state = checkpoint.from_float32(tx, weights)
    got = checkpoint.to_float32(params, state)
    assert np.all(np.abs(got - weights) <= bound * np.abs(weights))


def test_float16_and_mixed_dtypes():
  weights = _weights()
  dtypes = {'embed': jnp.float16, 'head': jnp.float32, 'steps': jnp.int32}
  tx = TRANSFORMS['alone']
  params, state = checkpoint.from_float32(tx, weights, dtypes)
  assert {k: v.dtype for k, v in params.items()} == dtypes
  chex.assert_trees_all_equal(checkpoint.to_float32(params, state), weights)
  like = jax.eval_shape(lambda: params)
  again, _ = checkpoint.from_float32(tx, weights, like)
  chex.assert_trees_all_equal(again, params)


def test_training_goes_on_as_in_float32():
  """Exact: operation by operation, from weights that bfloat16 cannot hold."""
  inner = optax.adamw(1e-2, weight_decay=0.1)
  tx = optax_mp.compensated(inner)
  weights = _weights()['embed']
  params, state = checkpoint.from_float32(tx, weights)
  state32 = inner.init(weights)
  for step in range(5):
    grads = jnp.cos(step + weights)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    updates, state32 = inner.update(grads, state32, weights)
    weights = optax.apply_updates(weights, updates)
    chex.assert_trees_all_equal(checkpoint.to_float32(params, state), weights)


def test_a_compressed_inner_state_is_stored():
  tx = optax_mp.adamw_bf16(1e-3, min_size=0)
  _, state = checkpoint.from_float32(tx, _weights()['embed'])
  assert formats.is_stored(state.inner_state.inner_state[0].mu)


def test_no_compensation_would_lose_bits():
  tx = _partition(optax_mp.compensated(SGD), SGD)
  with pytest.raises(ValueError, match="'head' that no `compensated`.*float32"):
    checkpoint.from_float32(tx, _weights())


def test_dtype_of_another_structure():
  with pytest.raises(ValueError, match='`dtype` does not have the structure'):
    checkpoint.from_float32(TRANSFORMS['alone'], _weights(), {'embed': None})


def test_groups_by_dtype():
  def by_dtype(params):
    return jax.tree.map(lambda x: str(x.dtype), params)

  groups = {
    'bfloat16': optax_mp.compensated(optax.adam(1e-3)),
    'float32': optax.adam(1e-3),
    'int32': optax.set_to_zero(),
  }
  tx = optax.partition(groups, by_dtype)
  with pytest.raises(ValueError, match='by name or shape, not by dtype'):
    dtypes = {'embed': jnp.bfloat16, 'head': jnp.float32, 'steps': jnp.int32}
    checkpoint.from_float32(tx, _weights(), dtypes)


def test_residuals_of_other_parameters():
  params = {'a': jnp.ones(3, jnp.bfloat16)}
  state = TRANSFORMS['alone'].init(params)
  for wrong in (
    jnp.ones(3),
    jnp.ones(3, jnp.float16),
    jnp.ones((2, 1), jnp.bfloat16),
  ):
    with pytest.raises(ValueError, match="`params` has .* at 'a', which needs"):
      checkpoint.to_float32({'a': wrong}, state)
  with pytest.raises(ValueError, match='must hold the residual of'):
    checkpoint.to_float32(params, SGD.init(params))
  with pytest.raises(ValueError, match='got an optimizer state'):
    checkpoint.to_float32(state, params)


@pytest.mark.parametrize('dtype', [jnp.int8, 'bf16', 3])
def test_no_such_dtype(dtype):
  with pytest.raises(ValueError, match='`dtype` must be bfloat16, float16'):
    checkpoint.from_float32(TRANSFORMS['alone'], _weights(), dtype)


def test_state_of_other_parameters():
  tx = TRANSFORMS['alone']
  params, state = checkpoint.from_float32(tx, _weights())
  del params['head']
  with pytest.raises(ValueError, match='`state` does not have the structure'):
    checkpoint.to_float32(params, state)
