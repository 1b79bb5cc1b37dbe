# SPDX-License-Identifier: Apache-2.0
"""Grass against recorded runs, a slow reference, and its hazards."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_mp import memory
from optax_mp import optimizers
import quick
import recorded
from reference import grass as reference

DRAWS = [
  ('multinomial_norm', False),
  ('multinomial_norm', True),
  ('uniform', False),
  ('uniform', True),
]


def like(case):
  """A recorded rule is told from the others by its name alone."""
  hyper = case['hyper']
  drawn = hyper['rule'] == 'multinomial_norm_r'
  return optimizers.grass(
    hyper['lr'],
    hyper['rank'],
    hyper['update_gap'],
    rule='multinomial_norm' if drawn else 'topk',
    replacement=drawn,
    scale=hyper['alpha'],
    axis=hyper['axis'] - 2,
    b1=hyper['betas'][0],
    b2=hyper['betas'][1],
    eps=hyper['eps'],
    weight_decay=hyper['weight_decay'],
    matrices=None,
  )


RECORDED = recorded.cases('grass_reference')


@pytest.mark.parametrize('name', ['topr_rows_16x8', 'topr_cols_8x16_refresh3'])
def test_follows_the_recorded_run(name):
  case = RECORDED[name]
  states = recorded.assert_follows(like(case), case)
  assert_states([state[0] for state in states], case)


def test_follows_the_recorded_draw():
  """Between two choices the rows are what the state says they are."""
  case = RECORDED['multinomial_norm_replacement_16x8']
  tx, first = like(case), case['steps'][0]

  def init(params):
    grass, *others = tx.init(params)
    indices = jnp.asarray(case['forced_indices'][0])
    rho = recorded.array(first['rho'])
    count = jnp.ones_like(grass.count)  # nothing else looks at it
    return grass._replace(indices=indices, rho=rho, count=count), *others

  drawn = optax.GradientTransformation(init, tx.update)
  states = recorded.assert_follows(drawn, case)
  assert_states([state[0] for state in states], case)


def assert_states(states, case):
  for state, step in zip(states, case['steps'], strict=True):
    np.testing.assert_array_equal(np.sort(state.indices), step['indices'])
    recorded.assert_state(state.rho, step['rho'])
    for ours, theirs in {'mu': 'm', 'nu': 'v'}.items():
      moment = getattr(state.inner_state, ours)
      moment = moment if case['hyper']['axis'] == 0 else moment.T
      recorded.assert_state(moment, step[theirs])


@pytest.mark.parametrize('shape', [(13, 7), (7, 13), (8, 8), (1, 6), (5, 1)])
@pytest.mark.parametrize('rule', ['topk', 'multinomial_norm'])
def test_follows_the_reference(shape, rule):
  """With refreshes, weight decay and new warm-ups; draws are ours."""
  rng = np.random.default_rng(0)
  axis = -2 if shape[0] >= shape[1] else -1
  length = min(4, shape[axis])
  adam = 0.9, 0.95, 1e-8
  slow = reference.Grass(axis, length, 3, 0.5, adam, 1e-2, 0.1, rewarm=2)
  tx = optimizers.grass(
    1e-2, 4, 3, rule=rule, replacement=rule != 'topk', scale=0.5, b2=0.95,
    rewarm_steps=2, weight_decay=0.1, matrices=None,
  )  # fmt: skip
  w = rng.normal(size=shape)
  grads = [rng.normal(size=shape) for _ in range(7)]
  ours = recorded.run(tx, jnp.asarray(w), [jnp.asarray(g) for g in grads])
  for (params, state), g in zip(ours, grads, strict=True):
    draw = None
    if rule != 'topk':
      indices = np.asarray(state[0].indices)
      q = reference.share(g, axis, rule)[indices]
      draw = indices, 1 / np.sqrt(length * q)
      if slow.count % 3 == 0:
        np.testing.assert_allclose(state[0].rho, draw[1], rtol=1e-5)
    w = slow.step(w, g, draw)
    np.testing.assert_allclose(params, w, rtol=0.0, atol=recorded.PARAMS)


def choices(g, count, **settings):
  """Indices and rho of many seeds."""
  tx = optimizers.scale_by_grass(rank=4, **settings)
  state = tx.init(g)
  keys = jax.random.key_data(jax.random.split(jax.random.key(0), count))

  @quick.jit
  @jax.vmap
  def draw(key):
    _, after = tx.update(g, state._replace(rng_key=key))
    return after.indices, after.rho

  return map(np.asarray, draw(keys))


@pytest.mark.parametrize(('rule', 'replacement'), DRAWS)
@pytest.mark.parametrize('zero', [False, True])
def test_rows_are_drawn_as_often_as_they_should_be(rule, replacement, zero):
  """Statistical, 5 sigma: of the first of each draw."""
  g = np.random.default_rng(1).normal(size=(9, 3)) * np.arange(9)[:, None]
  g = np.zeros_like(g) if zero else g
  count = 4000
  indices, rho = choices(
    jnp.asarray(g), count, rule=rule, replacement=replacement
  )
  q = reference.share(g, -2, rule)
  seen = np.bincount(indices[:, 0], minlength=9) / count
  assert np.all(np.abs(seen - q) <= 5 * np.sqrt(q * (1 - q) / count))
  distinct = [len(set(row)) == 4 for row in indices.tolist()]
  if replacement:
    np.testing.assert_allclose(rho, (4 * q[indices]) ** -0.5, rtol=1e-5)
    assert not all(distinct)
  else:
    assert np.all(rho == 1) and all(distinct)


def test_rows_of_zeros_are_drawn_last():
  g = jnp.zeros((9, 3)).at[jnp.array([2, 5])].set(1.0)
  indices, _ = choices(g, 50, rule='multinomial_norm')
  assert np.all(np.sort(indices[:, :2], -1) == [2, 5])


def test_draws_differ_by_leaf_by_layer_and_by_choice():
  g = {'a': jnp.ones((64, 4)), 'b': jnp.ones((64, 4))}
  tx = optimizers.scale_by_grass(rank=8, gap=2, rule='uniform')
  step, start = quick.jit(tx.update), tx.init(g)
  _, first = step(g, start)
  _, same = step(g, first)
  _, second = step(g, same)
  _, layer = step(g, start, layer=jnp.int32(0))
  chex.assert_trees_all_equal(first.indices, same.indices)
  drawn = [first.indices['a'], first.indices['b'], second.indices['a']]
  drawn = [tuple(sorted(x.tolist())) for x in [*drawn, layer.indices['a']]]
  assert len(set(drawn)) == 4


def test_rows_of_equal_norm_are_the_first():
  """Exact; so are those of a gradient that is zero."""
  for g in (jnp.ones((9, 3)), jnp.zeros((9, 3))):
    tx = optimizers.scale_by_grass(rank=4)
    updates, state = quick.jit(tx.update)(g, tx.init(g))
    assert state.indices.tolist() == [0, 1, 2, 3]
    chex.assert_tree_all_finite(updates)


def test_rows_change_and_moments_start_anew_at_these_steps_only():
  """Exact: 1, 4, 7."""
  tx = optimizers.scale_by_grass(rank=1, gap=3)
  state = tx.init(jnp.zeros((5, 2)))
  step = quick.jit(tx.update)
  rows, ages = [], []
  for t in range(7):
    g = jnp.zeros((5, 2)).at[t % 5].set(1.0)
    _, state = step(g, state)
    rows.append(int(state.indices[0]))
    ages.append(int(state.inner_state.count))
  assert rows == [0, 0, 0, 3, 3, 3, 1]
  assert ages == [1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize(
  'inner', [optax.scale_by_lion(), optax.trace(0.9), optax.scale_by_adan()]
)
def test_any_inner_optimizer(inner):
  """It sees rows of gradients and parameters; others do not move."""
  rng = np.random.default_rng(2)
  inner = optax.chain(inner, optax.add_decayed_weights(0.1))
  tx = optimizers.scale_by_grass(inner, rank=3, scale=1.0)
  params = {'w': jnp.asarray(rng.normal(size=(8, 4))), 'b': jnp.ones(4)}
  g = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
  state, alone = tx.init(params), inner.init(jnp.zeros((3, 4)))
  step, rows = quick.jit(tx.update), None
  for _ in range(3):
    updates, state = step(g, state, params)
    rows = state.indices['w']
    x, w = g['w'][rows], params['w'][rows]
    wanted, alone = inner.update(x, alone, w)
    # kind: derived, other programs.
    np.testing.assert_allclose(updates['w'][rows], wanted, rtol=1e-6, atol=1e-7)
  assert np.count_nonzero(np.any(updates['w'], -1)) == 3


def test_inner_has_no_learning_rate():
  """Exact: what it returns is multiplied by -eta s, as if it were a gradient.

  That is 1 here where it is what a step is: then weights go up.
  """
  g = jnp.eye(3) + 1
  for inner, sign in ((optax.identity(), -1), (optax.scale(-1.0), 1)):
    tx = optimizers.grass(
      0.5, 3, inner=inner, scale=0.25, matrices=None
    )  # fmt: skip
    updates, _ = quick.jit(tx.update)(g, tx.init(g))
    np.testing.assert_array_equal(updates, sign * 0.125 * g)


@pytest.mark.parametrize(
  ('axis', 'given'), [(-2, True), (-1, True), (-2, False)]
)
def test_inner_starts_from_the_rows_that_it_trains(axis, given):
  """Exact: at each choice, and not between; zeros without parameters."""
  inner = optax.GradientTransformation(
    lambda rows: rows, lambda g, state, _: (g, state)
  )
  tx = optimizers.scale_by_grass(inner, rank=1, gap=2, axis=axis)
  params = {'w': jnp.arange(1.0, 13).reshape(4, 3), 'b': jnp.ones(2)}
  step, state = quick.jit(tx.update), tx.init(params)
  for t in range(3):
    if t != 1:
      seen = jnp.take(params['w'], jnp.array([t]), axis) * given
    row = jnp.arange(4).reshape(4, 1) if axis == -2 else jnp.arange(3)
    g = {'w': jnp.where(row == t, 1.0, jnp.zeros((4, 3))), 'b': jnp.ones(2)}
    _, state = step(g, state, params if given else None)
    np.testing.assert_array_equal(state.inner_state['w'], seen)
    params['w'] += 100.0


def test_vectors_have_adam_that_is_never_reset():
  g = {'b': jnp.array([1.0, -2.0]), 's': jnp.float32(3), 'w': jnp.ones((4, 2))}
  tx, adam = optimizers.scale_by_grass(gap=2), optax.scale_by_adam()
  state, plain = tx.init(g), adam.init(g)
  step = quick.jit(tx.update)
  for _ in range(5):
    ours, state = step(g, state)
    wanted, plain = adam.update(g, plain)
  for name in ('b', 's'):
    # kind: derived, what is left of 1 - 0.999 in float32.
    np.testing.assert_allclose(ours[name], wanted[name], rtol=2.0**-14)


@pytest.mark.parametrize('axis', [None, -1, -2])
def test_a_stack_is_its_layers(axis):
  """Exact; the rule that draws nothing."""
  rng = np.random.default_rng(3)
  tx = optimizers.scale_by_grass(rank=2, gap=2, axis=axis)
  grads = [jnp.asarray(rng.normal(size=(3, 4, 5))) for _ in range(3)]

  step = jax.jit(tx.update)

  def run(grads):
    state = tx.init(grads[0])
    for g in grads:
      updates, state = step(g, state)
    return updates

  apart = [run([g[i] for g in grads]) for i in range(3)]
  np.testing.assert_array_equal(run(grads), np.stack(apart))


@pytest.mark.parametrize(
  ('shape', 'axis', 'bits'),
  [
    ((11008, 4096), None, 64 * 128 * 4096 + 64 * 128),
    ((4096, 11008), None, 64 * 128 * 4096 + 64 * 128),
    ((11008, 4096), -1, 64 * 128 * 11008 + 64 * 128),
    ((3, 64, 32), None, 3 * (64 * 64 * 32 + 64 * 64)),  # all of its rows
    ((4096,), None, 64 * 4096),
  ],
)
def test_bytes(shape, axis, bits):
  """Exact, but for two counts more, the number of steps and a key."""
  p = jax.ShapeDtypeStruct(shape, jnp.float32)
  tx = optimizers.scale_by_grass(axis=axis)
  state = jax.eval_shape(tx.init, p)
  total = sum(
    leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
  )
  assert 8 * total == bits + 3 * 32 + 64
  plan = memory.plan(tx, p, gradients=None)
  assert plan.total_bytes == total + 4 * p.size


@pytest.mark.parametrize(
  ('wrong', 'argument'),
  [
    ({'rank': 0}, 'rank'),
    ({'gap': 0}, 'gap'),
    ({'axis': 0}, 'axis'),
    ({'rule': 'top'}, 'rule'),
    ({'replacement': True}, 'replacement'),
    ({'rewarm_steps': -1}, 'rewarm_steps'),
    ({'b2': 1.0}, 'b2'),
    ({'eps': 0.0}, 'eps'),
  ],
)
def test_errors_name_the_argument(wrong, argument):
  with pytest.raises(ValueError, match=f'`{argument}`.*got'):
    optimizers.scale_by_grass(**wrong)


@pytest.mark.parametrize(
  ('argument', 'value'),
  [
    ('rank', 2),
    ('gap', 2),
    ('axis', -1),
    ('replacement', False),
    ('rewarm_steps', 0),
  ],
)
def test_arrays_for_what_must_be_static_are_refused(argument, value):
  with pytest.raises(ValueError, match=f'`{argument}`.*static_args'):
    optimizers.scale_by_grass(**{argument: jnp.asarray(value)})
