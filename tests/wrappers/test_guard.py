# SPDX-License-Identifier: Apache-2.0
"""`skip_nonfinite`, and Optax's conditional wrappers around what is ours."""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from compilers import compile_for
import optax_mp
from optax_mp import checkpoint
from optax_mp import formats
from optax_mp import memory
import quick
import tables

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
BAD = {'nan': np.nan, 'infinite': np.inf, 'square': 1e20, 'largest': 3e38}


def tree(dtype=BF16, rows=16):
  keys = jax.random.split(jax.random.key(0))
  shapes = {'kernel': (rows, 128), 'bias': (128,)}
  return {
    name: jax.random.normal(key, shape).astype(dtype)
    for key, (name, shape) in zip(keys, shapes.items(), strict=True)
  }


def recipe(name):
  row = tables.RECIPES[name]
  return row.recipe(row.lr, min_size=0, **row.settings)


def stepping(tx):
  def step(params, state, gradients):
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  return step


def poisoned(gradients, value):
  return {**gradients, 'kernel': gradients['kernel'].at[3, 5].set(value)}


def assert_same_bits(x, y):
  assert jax.tree.structure(x) == jax.tree.structure(y)
  for one, other in zip(*map(jax.tree.leaves, (x, y)), strict=True):
    assert one.dtype == other.dtype
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def assert_skips(tx, params, good, bad):
  """kind: exact. A step that is skipped leaves no bit, and the next one is."""
  step, state = quick.jit(stepping(tx)), tx.init(params)
  params, state = step(params, state, good)
  assert state.last_finite and not state.total_notfinite
  new_params, new_state = step(params, state, bad)
  assert_same_bits(new_params, params)
  assert_same_bits(new_state.inner_state, state.inner_state)
  assert new_state.notfinite_count == new_state.total_notfinite == 1
  assert not new_state.last_finite
  last_params, last_state = step(new_params, new_state, good)
  expected_params, expected_state = step(params, state, good)
  assert_same_bits(last_params, expected_params)
  assert_same_bits(last_state.inner_state, expected_state.inner_state)
  assert (last_params['kernel'] != params['kernel']).any()
  assert last_state.last_finite and last_state.total_notfinite == 1
  assert last_state.notfinite_count == 0


@functools.cache
def guarded(name):
  return optax_mp.skip_nonfinite(recipe(name))


@pytest.mark.parametrize('bad', BAD)
@pytest.mark.parametrize('name', ['adamw_8bit', 'adamw_bf16', 'coat_adamw'])
def test_a_step_that_is_not_finite(name, bad):
  """Of 1e20 in bfloat16 the gradient is finite and the second moment is not."""
  params = tree()
  assert_skips(guarded(name), params, params, poisoned(params, BAD[bad]))


@pytest.mark.parametrize('name', tables.RECIPES)
def test_every_recipe(name):
  """Infinite, since without squares nothing overflows of 1e20."""
  params = tree()
  assert_skips(guarded(name), params, params, poisoned(params, np.inf))


@pytest.mark.parametrize('gradients', [F16, F32])
@pytest.mark.parametrize('dtype', [F16, F32])
def test_other_dtypes(dtype, gradients):
  params = tree(dtype)
  good = optax.tree.cast(params, gradients)
  tx = optax_mp.skip_nonfinite(
    optax_mp.compressed(optax.adam(1e-2), formats.BlockInt(8), min_size=0)
    if dtype == F32
    else recipe('adamw_8bit')
  )
  assert_skips(tx, params, good, poisoned(good, np.inf))


def test_a_step_that_is_finite_is_the_step():
  """kind: exact, operation by operation."""
  tx, params = recipe('adamw_8bit'), tree()
  around = optax_mp.skip_nonfinite(tx)
  state = around.init(params)
  updates, new_state = around.update(params, state, params)
  expected, expected_state = tx.update(params, tx.init(params), params)
  assert_same_bits(updates, expected)
  assert_same_bits(new_state.inner_state, expected_state)


def test_updates_of_a_skipped_step_change_no_float():
  """-0.0 in the dtype of the update, and 0 of an integer."""

  def init_fn(params):
    del params
    return jnp.zeros(())

  def update_fn(updates, state, params=None):
    del params
    return updates, state + jnp.inf

  tx = optax_mp.skip_nonfinite(optax.GradientTransformation(init_fn, update_fn))
  params = {
    'float': jnp.array([0.0, -0.0, np.inf, 1e-30, 3.0]),
    'half': jnp.array([-0.0, 0.0, 1.0], BF16),
    'whole': jnp.array([1, -2]),
    'byte': jnp.array([1, 2], jnp.uint8),
    'flag': jnp.array([True]),
    'none': None,
  }
  updates = {**params, 'float': jnp.ones(5)}
  found, state = tx.update(updates, tx.init(params), params)
  assert state.total_notfinite == 1
  assert not state.inner_state
  zeros = jax.tree.map(jnp.zeros_like, updates)
  chex.assert_trees_all_equal_shapes_and_dtypes(found, zeros)
  chex.assert_trees_all_equal(found, zeros)
  assert jnp.signbit(found['float']).all() and jnp.signbit(found['half']).all()
  del params['flag'], found['flag']  # which Optax cannot add
  assert_same_bits(optax.apply_updates(params, found), params)


def test_counts_and_gives_up_as_optax_does():
  """kind: exact. Good and bad steps in every order of four, and more."""
  params = tree(F32)
  ours = optax_mp.skip_nonfinite(optax.adam(1e-2), 2)
  theirs = optax.apply_if_finite(optax.adam(1e-2), 2)
  rng = np.random.default_rng(0)
  step, other_step = (quick.jit(stepping(tx)) for tx in (ours, theirs))
  for _ in range(3):
    now = params, ours.init(params)
    other = params, theirs.init(params)
    for bad in rng.random(12) < 0.6:
      gradients = poisoned(params, np.nan if bad else 1.0)
      now, other = step(*now, gradients), other_step(*other, gradients)
      for field in ('notfinite_count', 'last_finite', 'total_notfinite'):
        assert getattr(now[1], field) == getattr(other[1], field), field
      chex.assert_trees_all_close(now[0], other[0], rtol=1e-6)


def test_without_a_limit_no_step_is_taken():
  params = tree(F32)
  tx = optax_mp.skip_nonfinite(optax.sgd(1.0))
  state = tx.init(params)
  for i in range(1, 5):
    updates, state = tx.update(poisoned(params, np.nan), state, params)
    assert state.notfinite_count == i
    assert not jnp.any(updates['kernel'])


# What else becomes infinite than a gradient.


def test_a_parameter_that_overflows():
  params = {'kernel': jnp.array([6.5e4, 1.0], F16)}
  tx = optax_mp.skip_nonfinite(optax_mp.compensated(optax.sgd(1.0)))
  gradients = {'kernel': jnp.array([-1e3, 1.0], F16)}
  updates, state = tx.update(gradients, tx.init(params), params)
  assert state.total_notfinite == 1
  assert_same_bits(optax.apply_updates(params, updates), params)


def test_a_state_that_overflows_and_no_update():
  """With the old moment the update is finite."""
  tx = optax.chain(optax.trace(0.9), optax.clip(1.0))
  params = jnp.ones(3)
  for inner in (tx, optax_mp.compressed(tx, formats.Split(8), min_size=0)):
    guard = optax_mp.skip_nonfinite(inner)
    state = guard.init(params)
    for _ in range(3):
      updates, state = guard.update(jnp.full(3, 3e38), state)
    assert state.total_notfinite == 2
    assert jnp.isfinite(jax.tree.leaves(state)[-1]).all()
    np.testing.assert_array_equal(updates, 0)


@dataclasses.dataclass(frozen=True)
class Saturated:
  """A format that keeps an infinity as a large number."""

  def encode(self, x, key=None):
    del key
    return jnp.nan_to_num(x).astype(BF16)

  def decode(self, stored, like):
    return stored.astype(like.dtype)


def test_is_seen_before_a_format_hides_it():
  """In a chain, in a partition, in half of the tree."""
  inner = optax_mp.compressed(optax.adam(1e-3), Saturated(), min_size=0)
  params = tree()
  labels = {'kernel': 'ours', 'bias': 'theirs'}
  for tx in (
    inner,
    optax_mp.compensated(inner),
    optax.chain(optax.clip(1e30), inner, optax.scale(0.5)),
    optax.partition({'ours': inner, 'theirs': optax.sgd(1.0)}, labels),
    optax_mp.skip_nonfinite(inner),
    optax.masked(inner, {'kernel': True, 'bias': False}),
  ):
    guard = optax_mp.skip_nonfinite(tx)
    state = guard.init(params)
    _, state = guard.update(poisoned(params, 1e20), state, params)
    assert state.total_notfinite == 1
    _, state = guard.update(params, state, params)
    assert state.total_notfinite == 1


def test_what_was_not_finite_before_does_not_count():
  """Else one NaN of a frozen parameter would stop the training for good."""

  class Best(NamedTuple):
    loss: Any

  def init_fn(params):
    del params
    return Best(jnp.array(jnp.inf))

  def update_fn(updates, state, params=None):
    del params
    return jax.tree.map(lambda u: -0.1 * u, updates), state

  best = optax.GradientTransformation(init_fn, update_fn)
  params = {'kernel': jnp.array([np.nan, np.inf, 1.0], BF16)}
  for tx in (best, optax_mp.compensated(best)):
    guard = optax_mp.skip_nonfinite(tx)
    gradients = {'kernel': jnp.ones(3, BF16)}
    updates, state = guard.update(gradients, guard.init(params), params)
    assert state.last_finite
    assert optax.apply_updates(params, updates)['kernel'][2] < 1


# Where it can be.


def test_under_scan_vmap_and_multi_steps():
  params = tree()
  bad = poisoned(params, 1e20)
  tx = guarded('adamw_8bit')

  def body(carry, flip):
    gradients = jax.tree.map(lambda b, g: jnp.where(flip, b, g), bad, params)
    return stepping(tx)(*carry, gradients), None

  flips = jnp.array([False, True, False])
  scan = quick.jit(lambda carry: jax.lax.scan(body, carry, flips)[0])
  new, state = scan((params, tx.init(params)))
  assert state.total_notfinite == 1
  chex.assert_tree_all_finite(new)
  # Each row for itself.
  rows = jax.tree.map(lambda *x: jnp.stack(x), params, bad)
  twice = jax.tree.map(lambda p: jnp.stack([p, p]), params)
  states = jax.vmap(tx.init)(twice)
  _, states = quick.jit(jax.vmap(tx.update))(rows, states, twice)
  assert states.total_notfinite.tolist() == [0, 1]


@pytest.mark.parametrize(
  ('place', 'bad_value'),
  [('inside', 3e38), ('outside', 1e20), ('outside', np.nan)],
)
def test_in_multi_steps(place, bad_value):
  """Outside it sees what is stored, and a NaN before it is in their sum."""
  params = tree()
  if place == 'inside':
    tx = optax.MultiSteps(guarded('adamw_8bit'), 2)
  else:
    every = optax.MultiSteps(recipe('adamw_8bit'), 2)
    tx = optax_mp.skip_nonfinite(every.gradient_transformation())
  step, state = quick.jit(stepping(tx)), tx.init(params)
  for bad in (False, True, False, False):
    gradients = poisoned(params, bad_value) if bad else params
    new, state = step(params, state, gradients)
  chex.assert_tree_all_finite(new)
  inner = state.inner_opt_state if place == 'inside' else state
  assert inner.total_notfinite == 1


def test_inside_of_another_wrapper_and_beside_hyperparameters():
  params = tree()
  tx = optax_mp.inject_hyperparams(
    lambda learning_rate: optax_mp.skip_nonfinite(
      optax_mp.adamw_8bit(learning_rate, min_size=0)
    )
  )(1e-3)
  step, state = quick.jit(stepping(tx)), tx.init(params)
  new, state = step(params, state, poisoned(params, np.nan))
  assert_same_bits(new, params)
  assert optax.tree_utils.tree_get(state, 'total_notfinite') == 1
  inside = optax_mp.compensated(optax_mp.skip_nonfinite(optax.adamw(1e-3)))
  new, state = stepping(inside)(
    params, inside.init(params), poisoned(params, np.nan)
  )
  assert_same_bits(new, params)


@pytest.mark.parametrize('value', [1e20, np.inf, np.nan])
@pytest.mark.parametrize('name', ['adamw_8bit', 'adamw_4bit', 'coat_adamw'])
def test_behind_a_compilation_of_its_own(name, value):
  """Flags may not leave a trace: what is stored is looked at instead."""
  inner, params = recipe(name), tree()
  compiled = optax.GradientTransformationExtraArgs(
    inner.init, jax.jit(inner.update)
  )
  tx = optax_mp.skip_nonfinite(compiled)
  assert_skips(tx, params, params, poisoned(params, value))


def test_keys_and_codes_are_chosen_as_they_are():
  tx = optax_mp.skip_nonfinite(
    optax.chain(
      optax.add_noise(1e-3, 0.5, jax.random.key(0)),
      optax_mp.compressed(
        optax.sgd(0.1, 0.9), formats.BlockInt(4, map='softsign'), min_size=0
      ),
      optax_mp.compressed(optax.trace(0.9), formats.Float8(), min_size=0),
    )
  )
  params = tree(F32)
  step, state = quick.jit(stepping(tx)), tx.init(params)
  params, state = step(params, state, params)
  new, skipped = step(params, state, poisoned(params, np.nan))
  assert_same_bits(new, params)
  old_key, key = (s.inner_state[0].rng_key for s in (state, skipped))
  assert (jax.random.key_data(key) == jax.random.key_data(old_key)).all()
  assert_same_bits(skipped.inner_state[1:], state.inner_state[1:])


def test_eight_devices_equal_one(mesh):
  """kind: exact. One bad value on one device stops all of them."""
  spec = jax.NamedSharding(mesh, PartitionSpec('d'))
  params = {'kernel': tree(rows=64)['kernel']}
  tx = guarded('adamw_8bit')
  step = quick.jit(stepping(tx))
  apart = jax.device_put(params, spec)
  state, alone = tx.init(apart), tx.init(params)
  for value in (1.0, 1e20, 2.0):
    bad = poisoned(params, value)
    params, alone = step(params, alone, bad)
    apart, state = step(apart, state, jax.device_put(bad, spec))
    assert apart['kernel'].sharding.is_equivalent_to(spec, 2)
  assert state.total_notfinite == alone.total_notfinite == 1
  assert_same_bits(apart, params)
  assert_same_bits(state, alone)


@pytest.mark.parametrize('name', ['adamw_8bit', 'adamw_bf16'])
def test_one_copy_of_the_state(name):
  """Claim: no second state, and no moment in float32, on a GPU."""
  inner = tables.RECIPES[name].recipe(1e-3)
  tx = optax_mp.skip_nonfinite(inner)
  params = [jax.ShapeDtypeStruct((4096, 4096), BF16)] * 2
  args = params, jax.eval_shape(tx.init, params), params
  report = memory.report(
    compile_for('h100', stepping(tx), *args, donate_argnums=(0, 1))
  )
  size = sum(p.size for p in params)
  assert report.temporary_bytes <= 0.2 * size
  assert report.alias_bytes >= memory.plan(inner, params, None).total_bytes
  assert report.bytes_moved <= 35 * size


@pytest.mark.parametrize('wrong', [-1, 1.5, True, 'all', jnp.array(1)])
def test_refuses_a_limit_that_is_none(wrong):
  with pytest.raises(ValueError, match='`max_consecutive` must be .*got '):
    optax_mp.skip_nonfinite(optax.sgd(1.0), wrong)


def test_says_what_is_wrong():
  with pytest.raises(ValueError, match='`tx` must be an Optax'):
    optax_mp.skip_nonfinite(optax.adam)  # pyright: ignore
  tx = optax_mp.skip_nonfinite(optax.sgd(1.0))
  with pytest.raises(ValueError, match='must be the SkipNonfiniteState'):
    tx.update(jnp.ones(2), optax.EmptyState())


# Optax's own, which take a branch.

CONDITIONAL = {
  'apply_if_finite': lambda tx: optax.apply_if_finite(tx, 5),
  'conditionally_transform': lambda tx: (
    optax.transforms.conditionally_transform(tx, lambda step: step >= 0)
  ),
  'conditionally_mask': lambda tx: optax.transforms.conditionally_mask(
    tx, lambda step: step >= 0
  ),
}


@pytest.mark.parametrize('dtype', [BF16, F16])
@pytest.mark.parametrize('bits', [16, 8, 0])
@pytest.mark.parametrize('name', CONDITIONAL)
def test_in_a_branch(name, bits, dtype):
  """Small steps are those of the recipe alone: they fit into 16 bits.

  kind: derived. Two programs fuse differently, by some bits of float32, which
  with fewer residual bits move a weight by one of its own.
  """
  params = tree(dtype)
  params = jax.tree.map(lambda p: p + jnp.sign(p), params)  # away from 0
  tx = optax_mp.compensated(optax.adam(1e-2), bits)
  around = CONDITIONAL[name](tx)
  step, other = (quick.jit(stepping(each)) for each in (tx, around))
  own, found = (params, tx.init(params)), (params, around.init(params))
  for scale in (1, 2, 3):
    gradients = jax.tree.map(functools.partial(jnp.multiply, scale), params)
    own, found = step(*own, gradients), other(*found, gradients)
  assert {p.dtype for p in jax.tree.leaves(found[0])} == {jnp.dtype(dtype)}
  found = checkpoint.to_float32(found[0], found[1].inner_state)
  last = {16: 2**-20, 8: 2**-15, 0: float(jnp.finfo(dtype).eps)}
  own = checkpoint.to_float32(*own)
  chex.assert_trees_all_close(found, own, rtol=last[bits])


def test_lands_where_it_says():
  """The parameter that Optax adds up, and its residual, make the weight."""
  rng = np.random.default_rng(0)
  start = jnp.asarray(rng.normal(size=4096) * 10.0 ** rng.integers(-3, 1, 4096))
  start = start.astype(BF16)
  tx = optax.apply_if_finite(optax_mp.compensated(optax.sgd(1.0), 16), 1)
  gradients = jnp.asarray(rng.normal(size=4096)).astype(BF16)
  new, state = quick.jit(stepping(tx))(start, tx.init(start), gradients)
  found = np.asarray(checkpoint.to_float32(new, state.inner_state), np.float64)
  exact = np.asarray(start, np.float64) - np.asarray(gradients, np.float64)
  old = np.asarray(start, np.float64)
  # kind: derived. Half a bit of the update, of 8 bits, and half a one of the
  # weight that it lands on, or, where that has a binade more, of the next.
  bound = 2**-8 * (np.abs(exact - old) + 2 * np.abs(exact))
  assert (np.abs(found - exact) <= bound).all()
  ratio = exact / old
  same = (ratio > 0.5) & (ratio < 2)
  assert same.any()
  np.testing.assert_array_equal(found[same], exact[same].astype(np.float32))
  # Of the parameter it is no more than the residual away.
  assert (
    np.abs(found - np.asarray(new, np.float64)) <= 2**-8 * abs(found)
  ).all()


def test_in_a_branch_of_mixed_dtypes():
  """A float32 parameter with a 16-bit gradient is refused before `cond`."""
  params = {'kernel': jnp.ones((8, 128), BF16), 'norm': jnp.ones(128)}
  tx = optax.apply_if_finite(optax_mp.compensated(optax.sgd(1.0)), 5)
  state = tx.init(params)
  with pytest.raises(
    ValueError, match="`updates` must.*'norm'.*skip_nonfinite"
  ):
    tx.update(optax.tree.cast(params, BF16), state, params)
  updates, _ = tx.update(params, state, params)  # each in its own
  assert updates['norm'].dtype == F32 and updates['kernel'].dtype == BF16
  updates, _ = tx.update(optax.tree.cast(params, F32), state, params)
  assert updates['kernel'].dtype == F32
