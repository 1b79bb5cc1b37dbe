# SPDX-License-Identifier: Apache-2.0
"""What GaLore, Fira and APOLLO have in common: bases, stacks, the limiter."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import memory
from optax_mp import optimizers
import quick

SCALE_BY = {
  'galore': optimizers.scale_by_galore,
  'fira': optimizers.scale_by_fira,
  'apollo': functools.partial(
    optimizers.scale_by_apollo, projector='svd', store_projection=True
  ),
}
LIMITED = {
  'fira': optimizers.scale_by_fira,
  'apollo': optimizers.scale_by_apollo,
  'apollo_mini': functools.partial(
    optimizers.scale_by_apollo, 1, 200, 128.0, scale_type='tensor'
  ),
}


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), 'float32')


def rows(g, rank, key):
  """A basis that tells which gradient it was made of."""
  del key
  tall = g.shape[-2] >= g.shape[-1]
  return g[..., :rank, :] if tall else g[..., :rank]


@pytest.mark.parametrize('name', SCALE_BY)
def test_a_basis_is_made_at_the_first_step_and_after_every_gap(name):
  """Exact: at steps 1, 4 and 7 of seven, and of that step's gradient."""
  tx = SCALE_BY[name](rank=2, gap=3, projector=rows)
  grads = [normal(t, 5, 4) for t in range(7)]
  state, update = tx.init(grads[0]), jax.jit(tx.update)
  for t, g in enumerate(grads):
    _, state = update(g, state)
    np.testing.assert_array_equal(state.projector, grads[t // 3 * 3][:2])


def drawn(g, rank, key):
  """A basis that tells which key made it."""
  tall = g.shape[-2] >= g.shape[-1]
  *stack, m, n = g.shape
  return jax.random.normal(key, (*stack, *((rank, n) if tall else (m, rank))))


@pytest.mark.parametrize('name', SCALE_BY)
def test_functions_that_make_a_basis_get_a_key(name):
  """Exact: another for each leaf, seed, layer and basis, none for an SVD."""
  params = {'a': normal(0, 6, 4), 'b': normal(1, 6, 4)}
  make = functools.partial(SCALE_BY[name], rank=2, gap=2, projector=drawn)
  tx, other = make(), make(seed=1)
  update = quick.jit(
    lambda state, **extra: tx.update(params, state, **extra)[1]
  )
  start = tx.init(params)
  assert [start.rng_key.shape, start.rng_key.dtype] == [(2,), jnp.uint32]
  states = [update(start)]
  for _ in range(3):
    states.append(update(states[-1]))
  first, same, second, again = (state.projector for state in states)
  chex.assert_trees_all_equal(first, same)
  chex.assert_trees_all_equal(second, again)
  others = [
    update(other.init(params)).projector,
    *[update(start, layer=jnp.int32(i)).projector for i in (0, 1)],
  ]
  found = [p for tree in (first, second, *others) for p in tree.values()]
  assert len(found) == len(np.unique(found, axis=0)) == 10
  assert not jax.tree.leaves(SCALE_BY[name]().init(params).rng_key)


@pytest.mark.skipif(
  jax.default_backend() != 'cpu', reason='reads the program of XLA:CPU'
)
@pytest.mark.parametrize('name', SCALE_BY)
@pytest.mark.parametrize('shape', [(12, 5), (3, 5, 12)])
def test_only_a_conditional_decomposes(name, shape):
  """In the compiled program."""
  tx = SCALE_BY[name](rank=2, gap=3)
  g = normal(0, *shape)
  text = jax.jit(tx.update).lower(g, tx.init(g)).compile().as_text()
  assert decomposes(text, conditional=True)
  assert not decomposes(text, conditional=False)


def decomposes(text, conditional):
  """Whether branches, or what always runs, call for a decomposition."""
  head = r'^((?:ENTRY )?)%?([\w.\-]+) [^\n]*\{\n(.*?)^\}'
  blocks = re.findall(head, text, re.MULTILINE | re.DOTALL)
  bodies = {name: body for _, name, body in blocks}
  todo = [name for entry, name, _ in blocks if entry]
  found, branches = set(todo), set()
  while todo:
    for line in bodies[todo.pop()].splitlines():
      names = set(re.findall(r'%?([\w.\-]+)', line)) & set(bodies)
      if ' conditional(' in line:
        branches |= names
      else:
        todo.extend(names - found)
        found |= names
  assert branches
  where = branches if conditional else found
  return any('gesdd' in bodies[name] for name in where)


@pytest.mark.parametrize('name', [*SCALE_BY, 'apollo_mini'])
def test_a_stack_is_its_layers(name):
  """kind: derived, sums in another order. Over a refresh, layers of all sizes.

  Draws differ from leaf to leaf, so this is about projectors without any.
  """
  tx = dict(SCALE_BY, apollo_mini=mini)[name](gap=2)
  sizes = np.float32([1.0, 9.0, 1e-4])[:, None, None]
  params = {'tall': jnp.ones((3, 6, 4)), 'wide': jnp.ones((3, 4, 6))}
  grads = [
    {'tall': sizes * normal(t, 3, 6, 4), 'wide': sizes * normal(9 + t, 3, 4, 6)}
    for t in range(3)
  ]
  together, update = [], jax.jit(tx.update)
  state = tx.init(params)
  for g in grads:
    u, state = update(g, state)
    together.append(u)
  for i in range(3):
    layer = functools.partial(jax.tree.map, lambda x, i=i: x[i])
    state = tx.init(layer(params))
    for g, all_layers in zip(grads, together, strict=True):
      u, state = update(layer(g), state)
      chex.assert_trees_all_close(u, layer(all_layers), rtol=1e-4, atol=1e-6)


def mini(gap):
  return optimizers.scale_by_apollo(
    1, gap, 128.0, scale_type='tensor', projector=rows, store_projection=True
  )


SHAPES = {
  'galore': lambda r, short, long: 4 * r * (2 * long + short),
  'fira': lambda r, short, long: 4 * r * (2 * long + short) + 4,
  'apollo': lambda r, short, long: 8 * r * long + 4,
  'apollo_mini': lambda r, short, long: 8 * long + 4,
}


@pytest.mark.parametrize('name', SHAPES)
@pytest.mark.parametrize('shape', [(512, 256), (256, 512), (256, 256)])
def test_bytes(name, shape):
  """Exact: matrices, each of a stack too, 8 per parameter of others."""
  rank = () if name == 'apollo_mini' else (32,)
  tx = getattr(optax_mp, name)(1e-3, *rank)
  wanted = SHAPES[name](32, min(shape), max(shape))
  for stack in ((), (3,)):
    p = {'w': jax.ShapeDtypeStruct((*stack, *shape), jnp.bfloat16)}
    state = jax.eval_shape(tx.init, p)
    found = sum(x.size * x.dtype.itemsize for x in arrays(state, 'w'))
    assert found == wanted * (*stack, 1)[0]
  bias = {'bias': jax.ShapeDtypeStruct((64,), jnp.bfloat16)}
  found = arrays(jax.eval_shape(tx.init, bias), 'bias')
  assert sum(x.size * x.dtype.itemsize for x in found) == 8 * 64


def arrays(state, name):
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return [x for path, x in leaves if getattr(path[-1], 'key', None) == name]


@pytest.mark.parametrize('name', LIMITED)
def test_norms_grow_by_one_percent_at_most(name):
  """So a first gradient far below eps is a pace that is kept for long."""
  tx = LIMITED[name]()
  g = normal(0, 6, 4)
  update, norms = jax.jit(tx.update), {}
  for first in (1e-8, 1.0):
    state, norms[first] = tx.init(g), []
    for size in (first, 1.0, 10.0, 10.0):
      _, state = update(size * g, state)
      norms[first].append(float(state.norm))
  small = np.array(norms[1e-8])
  # kind: derived. 1e-8, which is added to norms, is 1e-5 of the smallest.
  np.testing.assert_allclose(small[1:] / small[:-1], 1.01, rtol=2e-5)
  assert small[-1] < 1e-2 and norms[1.0][-1] > 1.0


@pytest.mark.parametrize('name', LIMITED)
def test_steps_without_gradient_set_no_pace(name):
  """Exact: before the first gradient, and in between."""
  tx = LIMITED[name]()
  g, zero = normal(0, 6, 4), jnp.zeros((6, 4))
  update = jax.jit(tx.update)
  state = tx.init(g)
  for gradient, is_set in ((zero, False), (g, True), (zero, False), (g, True)):
    u, state = update(gradient, state)
    assert bool(state.norm > 0) is is_set
    chex.assert_tree_all_finite(u)
    if is_set:  # not from 1e-8 of it on
      assert float(jnp.linalg.norm(u)) > 1e-2


@pytest.mark.parametrize('name', [*SCALE_BY, 'random'])
def test_awkward_leaves(name, strict):
  """Empty ones, scalars, ranks of more than there is, gradients of zero."""
  tx = dict(SCALE_BY, random=optimizers.scale_by_apollo)[name](rank=100)
  params = {
    'empty': jnp.zeros((0, 4)),
    'scalar': jnp.zeros(()),
    'vector': jnp.zeros((3,)),
    'row': jnp.zeros((1, 5)),
    'column': jnp.zeros((5, 1)),
    'none': jnp.zeros((2, 0, 3)),
  }
  update, state = jax.jit(tx.update), tx.init(params)
  for g in (params, jax.tree.map(jnp.ones_like, params), params):
    u, state = update(g, state)
    chex.assert_tree_all_finite((u, state))
    chex.assert_trees_all_equal_shapes_and_dtypes(u, params)


@pytest.mark.parametrize('name', SCALE_BY)
def test_errors_name_the_argument(name):
  make = SCALE_BY[name]
  for wrong in ({'rank': 0}, {'gap': 2.5}, {'b1': 1.0}, {'eps': 0.0}):
    (argument,) = wrong
    with pytest.raises(ValueError, match=f'`{argument}`.*got'):
      make(**wrong)
  with pytest.raises(ValueError, match="`projector` must be .*got 'topk'"):
    make(projector='topk')
  tx = make(rank=2, projector=lambda g, rank, key: g)
  with pytest.raises(ValueError, match='`projector` must return .*got'):
    tx.update(jnp.ones((4, 4)), tx.init(jnp.ones((4, 4))))


def test_errors_of_apollo():
  with pytest.raises(ValueError, match="`scale_type` must be .*got 'row'"):
    optimizers.scale_by_apollo(scale_type='row')  # pyright: ignore
  with pytest.raises(ValueError, match='`scale` must be .*got -1'):
    optimizers.scale_by_apollo(scale=-1.0)


@pytest.mark.parametrize('name', SHAPES)
def test_other_leaves_have_adamw(name):
  """Embeddings, biases and what `matrices` leaves out, decay after the step."""
  tx = getattr(optax_mp, name)(1e-2, weight_decay=0.1, adam_learning_rate=1e-3)
  params = {
    'embed': normal(0, 6, 4),
    'bias': normal(1, 4),
    'kernel': normal(2, 6, 4),
  }
  update, state = jax.jit(tx.update), tx.init(params)
  plain = optax.adam(1e-3, eps=0.0)
  alone = plain.init(params)
  for t in range(3):
    g = {k: normal(10 + t, *p.shape) for k, p in params.items()}
    u, state = update(g, state, params)
    d, alone = plain.update(g, alone)
    for k in ('embed', 'bias'):
      wanted = d[k] - 1e-4 * (params[k] + d[k])
      # kind: derived. Of gradients of 0.01 and more an eps of 1e-6.
      np.testing.assert_allclose(u[k], wanted, rtol=0.0, atol=1e-6)
    assert not np.allclose(u['kernel'], d['kernel'], rtol=0.0, atol=1e-4)
    params = optax.apply_updates(params, u)


def test_plan_counts_what_docstrings_say():
  """Exact to the digits there: of 4096 x 4096 at rank 128, and rank 1."""
  p = {'w': jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
  for name, digits in {
    'galore': '0.375',
    'fira': '0.375',
    'apollo': '0.250',
    'apollo_mini': '0.002',
  }.items():
    plan = memory.plan(getattr(optax_mp, name)(1e-2), p, gradients=None)
    assert f'{plan.bytes_per_param - 4:.3f}' == digits
