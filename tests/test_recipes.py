# SPDX-License-Identifier: Apache-2.0
"""Recipes: Optax's signature, and nothing but a combination of the parts."""

import inspect

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_mp
from optax_mp import formats

OURS = {'residual_bits': 16, 'min_size': 4096, 'seed': 0}
RECIPES = {
  'adamw_bf16': (optax.adamw, {}),
  'sgdm_bf16': (optax.sgd, {'momentum': 0.9}),
  'lion_bf16': (optax.lion, {}),
}


@pytest.mark.parametrize('name', RECIPES)
def test_signature_is_that_of_optax_and_ours(name):
  base, defaults = RECIPES[name]
  theirs = {
    k: defaults.get(k, p.default)
    for k, p in inspect.signature(base).parameters.items()
  }
  got = inspect.signature(getattr(optax_mp, name)).parameters
  assert {k: p.default for k, p in got.items()} == {**theirs, **OURS}


@pytest.mark.parametrize('bits', [16, 8, 0])
@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe_is_its_parts(name, bits):
  base, defaults = RECIPES[name]
  recipe = getattr(optax_mp, name)(0.01, residual_bits=bits, seed=3)
  inner = optax_mp.compressed(base(0.01, **defaults), formats.Split(8), seed=3)
  parts = optax_mp.compensated(inner, bits, seed=3)
  params = {'w': jnp.ones((64, 64), jnp.bfloat16)}
  grads = jax.tree.map(jnp.sin, params)
  results = []
  for tx in (recipe, parts):
    state = tx.init(params)
    for _ in range(2):
      updates, state = tx.update(grads, state, params)
    results.append((updates, state))
  chex.assert_trees_all_equal(*results)


def test_momentum_is_optax_s_to_choose():
  params = {'w': jnp.ones((64, 64), jnp.bfloat16)}
  tx = optax_mp.sgdm_bf16(0.1, 0.5, nesterov=True)
  grads = jax.tree.map(jnp.ones_like, params)
  updates, _ = tx.update(grads, tx.init(params), params)
  expected = jnp.asarray(1 - 0.1 * 1.5, jnp.bfloat16)
  assert jnp.all(optax.apply_updates(params, updates)['w'] == expected)


def test_unknown_arguments_are_refused():
  with pytest.raises(TypeError, match='learning_rat'):
    optax_mp.adamw_bf16(learning_rat=0.1)
  with pytest.raises(ValueError, match='`residual_bits` must be one of'):
    optax_mp.lion_bf16(1e-3, residual_bits=4)


def test_groups_of_small_leaves():
  """Weight decay for matrices only, by groups, as many programs do it."""
  groups = {
    'decay': optax_mp.adamw_bf16(1e-3, weight_decay=0.1),
    'none': optax_mp.adamw_bf16(1e-3, weight_decay=0.0),
  }
  tx = optax.partition(groups, {'w': 'decay', 'b': 'none'})
  params = {
    'w': jnp.ones((64, 64), jnp.bfloat16),
    'b': jnp.ones(64, jnp.bfloat16),
  }
  updates, _ = tx.update(params, tx.init(params), params)
  chex.assert_tree_all_finite(updates)


def test_settings_that_a_recipe_cannot_keep():
  params = {'w': jnp.ones((64, 64), jnp.bfloat16)}
  with pytest.raises(ValueError, match='`momentum` must be a number; got None'):
    optax_mp.sgdm_bf16(0.1, momentum=None)
  with pytest.raises(ValueError, match='Leave out `mu_dtype`'):
    optax_mp.adamw_bf16(1e-3, mu_dtype=jnp.bfloat16).init(params)
