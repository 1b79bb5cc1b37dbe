# SPDX-License-Identifier: Apache-2.0
"""Hyperparameters in the state: ours, and Optax's around what is ours."""

import functools
import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import checkpoint
import quick
import tables

BF16 = jnp.bfloat16
# The optimizers of papers by their own names, with what they need.
PAPERS = {
  name: row
  for name, row in tables.PAPERS.items()
  if row.make.func.__name__ == name
}
FACTORIES: dict[str, Any] = {
  name: row.recipe for name, row in tables.RECIPES.items()
} | {name: row.make.func for name, row in PAPERS.items()}
# What a state holds once; two groups of parameters have two of each.
ONCE = {
  'adamw_8bit': ('count', 'mu', 'nu'),
  'adamw_4bit': ('count', 'mu', 'nu'),
  'adamw_4bit_factored': ('count', 'mu', 'nu'),
  'adamw_bf16': ('count', 'mu', 'nu'),
  'coat_adamw': ('count', 'mu', 'nu'),
  'flash_adamw': ('count', 'mu', 'nu'),
  'ademamix_8bit': ('count', 'm1', 'm2', 'nu'),
  'lion_8bit': ('count', 'mu'),
  'lion_bf16': ('count', 'mu'),
  'sgdm_8bit': ('trace',),
  'sgdm_bf16': ('trace',),
}


def tree():
  keys = jax.random.split(jax.random.key(0))
  shapes = {'kernel': (16, 128), 'bias': (128,)}
  return {
    name: jax.random.normal(key, shape).astype(BF16)
    for key, (name, shape) in zip(keys, shapes.items(), strict=True)
  }


def settings(name):
  if name in tables.RECIPES:
    row = tables.RECIPES[name]
    return {'learning_rate': row.lr, 'min_size': 0, **row.settings}
  row = PAPERS[name]
  return {'learning_rate': row.lr, **row.make.keywords}


def trained(tx, params, steps=4):
  def step(carry, gradients):
    params, state = carry
    updates, state = tx.update(gradients, state, params)
    return (optax.apply_updates(params, updates), state), None

  gradients = jax.tree.map(
    lambda p: jnp.stack([p * (i + 1) for i in range(steps)]), params
  )
  carry = params, tx.init(params)
  return quick.jit(lambda c, g: jax.lax.scan(step, c, g)[0])(carry, gradients)


def optax_injects(name):
  factory = FACTORIES[name]
  return optax.inject_hyperparams(factory, static_args=factory.static_args)


def ours_injects(name):
  return optax_mp.inject_hyperparams(FACTORIES[name])


@pytest.mark.parametrize('name', FACTORIES)
def test_static_names_are_known(name):
  """All that the documentation names, in the order of the arguments."""
  static = FACTORIES[name].static_args
  names = list(inspect.signature(FACTORIES[name]).parameters)
  assert isinstance(static, tuple)
  assert list(static) == [n for n in names if n in static]
  if name in PAPERS:
    assert set(static) == set(PAPERS[name].static)
  else:
    ours = {'residual_bits', 'keep_float32', 'min_size', 'seed'} & set(names)
    functions = {'mask', 'weight_decay_mask'} & set(names)
    assert {*ours, *functions} <= set(static) and len(ours) >= 3
  assert 'learning_rate' not in static


@pytest.mark.parametrize('inject', [ours_injects, optax_injects])
@pytest.mark.parametrize('name', FACTORIES)
def test_with_bfloat16_parameters_all_is_in_float32(name, inject):
  """Traced: every recipe and optimizer, nothing but defaults."""
  tx, params = inject(name)(**settings(name)), tree()
  state = jax.eval_shape(tx.init, params)
  for key, value in state.hyperparams.items():
    is_float = jnp.issubdtype(value.dtype, jnp.floating)
    assert not is_float or value.dtype == jnp.float32, key
  assert 'learning_rate' in state.hyperparams
  _, new = jax.eval_shape(tx.update, params, state, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


@pytest.mark.parametrize('inject', [ours_injects, optax_injects])
@pytest.mark.parametrize(
  'name', ['adamw_8bit', 'adamw_4bit', 'adamw_bf16', 'lion_8bit', 'sgdm_8bit']
)
def test_as_the_recipe_itself(name, inject):
  """kind: derived. Two programs fuse differently, which moves one code in 2^15.

  A code that is moved turns the step of its weight by up to all of it: of 2176
  weights in 4 steps, one or none, and the root of 2 / 2176 of all is 3 %.
  """
  params = tree()
  plain = FACTORIES[name](**settings(name))
  exact = checkpoint.to_float32(*trained(plain, params))
  found, state = trained(inject(name)(**settings(name)), params)
  found = checkpoint.to_float32(found, state.inner_state)
  start = optax.tree.cast(params, jnp.float32)
  missed = optax.tree.norm(optax.tree.sub(found, exact))
  assert missed <= 0.03 * optax.tree.norm(optax.tree.sub(exact, start))


@pytest.mark.parametrize('name', FACTORIES)
@pytest.mark.parametrize('dtype', [BF16, jnp.float16])
def test_refuses_what_is_rounded(name, dtype):
  """Each number, and as Optax passes them: by keyword."""
  factory = FACTORIES[name]
  parameters = inspect.signature(factory).parameters
  numbers = [
    key
    for key, p in parameters.items()
    if key not in factory.static_args
    and (key == 'learning_rate' or isinstance(p.default, float))
  ]
  message = '`{}` must have 32 bits; got .*`hyperparam_dtype=jnp.float32`'
  for key in numbers:
    with pytest.raises(ValueError, match=message.format(key)):
      factory(**settings(name) | {key: jnp.asarray(0.5, dtype)})
  with pytest.raises(ValueError, match=message.format('learning_rate')):
    jax.eval_shape(lambda rate: factory(rate) and rate, jnp.ones((), dtype))


def test_a_function_of_ones_own_is_told_the_way_out():
  """Optax has rounded before any of ours is called: said in `init`."""

  def make(learning_rate, b2):
    return optax_mp.compensated(optax_mp.came(learning_rate, b2=b2))

  wrong = optax.inject_hyperparams(make)(1e-3, 0.999)
  with pytest.raises(ValueError, match='`hyperparam_dtype=jnp.float32`'):
    wrong.init(tree())
  for inject in (
    functools.partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32),
    optax_mp.inject_hyperparams,
  ):
    params, state = trained(inject(make)(1e-3, 0.999), tree())
    chex.assert_tree_all_finite(params)
    assert state.hyperparams['b2'] == np.float32(0.999)


def test_a_partial_of_a_recipe():
  make = functools.partial(optax_mp.adamw_8bit, b2=0.99, min_size=0)
  static = optax_mp.adamw_8bit.static_args
  inject = optax.inject_hyperparams(make, static_args=static)
  state = inject(1e-3).init(tree())
  assert state.hyperparams['b2'] == np.float32(0.99)
  assert state.hyperparams['learning_rate'] == np.float32(1e-3)


@pytest.mark.parametrize('name', ONCE)
def test_clients_find_each_once(name):
  """`tree_get` raises a KeyError where it finds two."""
  schedule = optax.constant_schedule(1e-3)
  for own in ({}, {'learning_rate': schedule}):
    tx = ours_injects(name)(**settings(name) | own)
    state = jax.eval_shape(tx.init, tree())
    for key in ('learning_rate', *ONCE[name]):
      found = optax.tree_utils.tree_get_all_with_path(state, key)
      assert len(found) == 1, key


def test_clients_read_and_set():
  tx, params = ours_injects('adamw_8bit')(**settings('adamw_8bit')), tree()
  state = tx.init(params)
  rate = optax.tree_utils.tree_get(state, 'learning_rate')
  assert rate == state.hyperparams['learning_rate'] == np.float32(1e-2)
  frozen = optax.tree_utils.tree_set(state, learning_rate=0.0)
  assert frozen.hyperparams['learning_rate'] == 0.0
  updates, new = jax.jit(tx.update)(params, frozen, params)
  assert not jnp.any(updates['kernel'])
  assert new.hyperparams['learning_rate'] == 0.0
  assert optax.tree_utils.tree_get(new, 'count') == 1


@pytest.mark.parametrize('inject', [ours_injects, optax_injects])
def test_schedules_are_in_float32(inject):
  schedule = optax.linear_schedule(0.0, 1e-3, 10)
  tx = inject('adamw_8bit')(
    schedule, weight_decay=lambda count: 1 / (count + 3)
  )
  params, state = tree(), tx.init(tree())
  update = jax.jit(tx.update)
  for i in range(3):
    _, state = update(params, state, params)
    # kind: derived, of a sum and a product that may be one operation.
    wanted = {'learning_rate': schedule(i), 'weight_decay': 1 / (i + 3)}
    for key, value in wanted.items():
      found = np.asarray(state.hyperparams[key])
      np.testing.assert_array_max_ulp(found, np.float32(value), 4)
  assert state.hyperparams['learning_rate'].dtype == jnp.float32


class Halved:
  """A schedule with a state: what it was told last, halved."""

  def init(self):
    return jnp.ones((), jnp.float32)

  def update(self, state, **extra_args):
    return state * 0 + extra_args['value']

  def __call__(self, state, **extra_args):
    return (state / 2).astype(jnp.bfloat16)


@pytest.mark.parametrize('inject', [ours_injects, optax_injects])
def test_schedules_with_a_state(inject):
  """One that returns bfloat16 itself is widened, or refused by name."""
  tx, params = inject('adamw_8bit')(Halved()), tree()
  if inject is optax_injects:
    with pytest.raises(ValueError, match='`learning_rate` must have 32 bits'):
      tx.init(params)
    return
  state = tx.init(params)
  for value in (3.0, 5.0):
    _, state = tx.update(params, state, params, value=jnp.float32(value))
  assert state.hyperparams['learning_rate'] == 1.5
  assert state.hyperparams['learning_rate'].dtype == jnp.float32


def test_says_what_cannot_be():
  with pytest.raises(ValueError, match="`static_args` must be .*got .'what'"):
    optax_mp.inject_hyperparams(optax_mp.adamw_8bit, 'what')
  make = optax_mp.inject_hyperparams(optax_mp.adamw_8bit)
  with pytest.raises(ValueError, match='`b1` must be a number.*got the sched'):
    make(1e-3, b1=optax.constant_schedule(0.9))


def test_any_factory():
  """With arguments by position, by name, and in any number."""

  def make(*clips, **rates):
    clip = [optax.clip(x) for x in clips]
    return optax.chain(*clip, optax.sgd(rates['rate'], nesterov=False))

  tx = optax_mp.inject_hyperparams(make)(0.5, 0.25, rate=1.0)
  updates, state = tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
  np.testing.assert_array_equal(updates, -0.25)
  assert set(state.hyperparams) == {'rate'}
  adam = optax_mp.inject_hyperparams(optax.adamw, 'mask')(
    1e-3, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
  )
  updates, _ = jax.jit(adam.update)(tree(), adam.init(tree()), tree())
  chex.assert_tree_all_finite(updates)
