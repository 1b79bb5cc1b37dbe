# SPDX-License-Identifier: Apache-2.0
"""`compressed`: the state of any optimizer in any format."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import formats

SPLIT = formats.Split(8)


def _params(dtype=jnp.float32):
  return {
    'embed': jnp.ones((64, 64), dtype),
    'layer': {'kernel': jnp.ones((64, 64), dtype), 'bias': jnp.ones(64, dtype)},
  }


def _adam_state(rule, **kwargs):
  tx = optax_mp.compressed(optax.adam(1e-3), rule, **kwargs)
  return tx.init(_params()).inner_state[0]


def _stored(tree):
  leaves = jax.tree.leaves(tree, is_leaf=formats.is_stored)
  return [formats.is_stored(leaf) for leaf in leaves]


def test_a_format_goes_to_every_large_float_leaf():
  state = _adam_state(SPLIT)
  assert _stored(state.mu) == _stored(state.nu) == [True, False, True]
  assert state.count.dtype == jnp.int32
  assert state.mu['layer']['bias'].dtype == jnp.float32
  chex.assert_shape(state.mu['embed'], (64, 64))


def test_min_size_is_the_smallest_that_is_stored():
  assert _stored(_adam_state(SPLIT, min_size=64).mu) == [True] * 3
  assert _stored(_adam_state(SPLIT, min_size=65).mu) == [True, False, True]
  assert not any(_stored(_adam_state({'nu': SPLIT}, min_size=4096).mu))


def test_a_mapping_names_state_fields():
  state = _adam_state({'mu': formats.BFloat16(), 'nu': None}, min_size=0)
  assert {x.dtype for x in jax.tree.leaves(state.mu)} == {jnp.dtype('bfloat16')}
  assert {x.dtype for x in jax.tree.leaves(state.nu)} == {jnp.dtype('float32')}


def test_a_function_sees_path_and_leaf():
  seen = {}

  def rule(path, leaf):
    seen[path] = (leaf.shape, leaf.dtype)
    return None if 'embed' in path else SPLIT

  state = _adam_state(rule)
  assert _stored(state.mu) == [False, False, True]
  assert seen == {
    f'0/{field}/{name}': ((64, 64), jnp.dtype('float32'))
    for field in ('mu', 'nu')
    for name in ('embed', 'layer/kernel')
  }


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_an_exact_format_changes_nothing(dtype):
  """Exact: with 16 residual bits the inner optimizer cannot tell."""
  inner = optax.adamw(1e-2, weight_decay=0.1)
  tx = optax_mp.compressed(inner, formats.Split(16), min_size=0)
  params = _params(dtype)
  wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
  state, expected_state = tx.init(params), inner.init(wide)
  for step in range(10):
    sines = [jnp.sin(step + p) for p in jax.tree.leaves(wide)]
    grads = jax.tree.unflatten(jax.tree.structure(wide), sines)
    narrow = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), narrow)
    updates, state = tx.update(narrow, state, params)
    expected, expected_state = inner.update(grads, expected_state, wide)
    expected = jax.tree.map(lambda u: u.astype(dtype), expected)
    chex.assert_trees_all_equal(updates, expected)


def test_the_update_uses_the_state_before_it_is_rounded():
  """Exact: the first update of a lossy format is that of float32."""
  inner = optax.adam(1e-3)
  tx = optax_mp.compressed(inner, formats.BFloat16(), min_size=0)
  params = _params()
  grads = jax.tree.map(lambda p: 0.1234567 * p, params)
  updates, _ = tx.update(grads, tx.init(params), params)
  expected, _ = inner.update(grads, inner.init(params), params)
  chex.assert_trees_all_equal(updates, expected)


def test_works_without_params():
  tx = optax_mp.compressed(optax.adam(1e-3), SPLIT)
  grads = _params()
  updates, _ = tx.update(grads, tx.init(grads))
  chex.assert_tree_all_finite(updates)


def test_the_state_never_exists_in_float32():
  """Exact: building the state takes its own bytes and no more."""
  tx = optax_mp.compressed(optax.adam(1e-3), SPLIT)
  params = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
  compiled = jax.jit(tx.init).lower(params).compile()
  report = optax_mp.memory.report(compiled)
  assert report.temporary_bytes < 4096  # keys; an array has 64 times that
  assert report.output_bytes < 6.01 * params.size


@pytest.mark.parametrize(
  'rule',
  ['split', formats.Split, 8, None, {'mu': 'bfloat16'}, {'mu': formats.Split}],
)
def test_no_rule(rule):
  with pytest.raises(ValueError, match=r'`rule.*must be a format'):
    optax_mp.compressed(optax.adam(1e-3), rule)


def test_a_function_that_returns_no_format():
  with pytest.raises(ValueError, match=r"`rule\('0/mu/embed', ...\)` must be"):
    _adam_state(lambda path, leaf: 'bfloat16')


def test_unknown_state_field():
  with pytest.raises(ValueError, match=r"fields \['nuu'\].*'mu', 'nu'"):
    _adam_state({'nuu': SPLIT})


@pytest.mark.parametrize(
  'inner, rule, min_size',
  [
    (optax.sgd(0.1), SPLIT, 0),
    (optax.adam(1e-3), SPLIT, 10_000),
    (optax.adam(1e-3), {'mu': None}, 0),
    (optax.adam(1e-3), lambda path, leaf: None, 0),
  ],
)
def test_a_rule_that_matches_no_leaf(inner, rule, min_size):
  tx = optax_mp.compressed(inner, rule, min_size=min_size)
  with pytest.raises(ValueError, match='`rule` matches no leaf.*Lower `min_s'):
    tx.init(_params())


def test_an_inner_state_that_is_rounded_already():
  inner = optax.adam(1e-3, mu_dtype=jnp.bfloat16)
  with pytest.raises(ValueError, match='`inner` keeps .* Leave out `mu_dtype`'):
    optax_mp.compressed(inner, SPLIT).init(_params())
  optax_mp.compressed(inner, {'nu': SPLIT}).init(_params())


class Inner(NamedTuple):
  mu: jax.Array
  nu: jax.Array


def test_parameters_called_like_fields():
  big = jnp.ones((64, 64))
  params = Fields(Inner(big, big), big)
  tx = optax_mp.compressed(optax.adam(1e-3), {'mu': SPLIT, 'nu': SPLIT})
  state = tx.init(params).inner_state[0]
  assert _stored(state.mu) == _stored(state.nu) == [True] * 3
  rows = optax_mp.memory.plan(tx, params).rows
  assert {r.field for r in rows} >= {'mu', 'nu'} and len(rows) == 6


def test_a_field_called_value_is_in_the_path():
  class Attention(NamedTuple):
    query: jax.Array
    value: jax.Array

  seen = []
  big = jnp.ones((64, 64))
  tx = optax_mp.compressed(
    optax.trace(0.9), lambda path, leaf: seen.append(path) or SPLIT
  )
  tx.init({'attention': Attention(big, big)})
  assert {'trace/attention/query', 'trace/attention/value'} == set(seen)


@pytest.mark.parametrize('min_size', [-1, 0.5, '4096', None])
def test_wrong_min_size(min_size):
  with pytest.raises(ValueError, match='`min_size` must be an integer'):
    optax_mp.compressed(optax.adam(1e-3), SPLIT, min_size=min_size)


def test_a_field_without_floats():
  with pytest.raises(ValueError, match=r"fields \['count'\]"):
    _adam_state({'mu': SPLIT, 'count': SPLIT})


class Fields(NamedTuple):
  mu: jax.Array
  nu: jax.Array


def test_fields_of_the_parameters_are_no_state_fields():
  params = Fields(jnp.ones((8, 8)), jnp.ones((8, 8)))
  rule = {'nu': formats.BFloat16()}
  tx = optax_mp.compressed(optax.adam(1e-3), rule, min_size=0)
  state = tx.init(params).inner_state[0]
  assert {x.dtype for x in state.mu} == {jnp.dtype('float32')}
  assert {x.dtype for x in state.nu} == {jnp.dtype('bfloat16')}
  tx = optax_mp.compressed(optax.trace(0.9), rule, min_size=0)
  with pytest.raises(ValueError, match=r"fields \['nu'\]"):
    tx.init(params)


@pytest.mark.parametrize(
  'before, after',
  [
    (formats.Split(16), SPLIT),
    (formats.SplitFloat16(8), SPLIT),
    (formats.BFloat16(), SPLIT),
    (SPLIT, formats.BFloat16()),
    (SPLIT, lambda path, leaf: SPLIT if 'mu' in path else None),
  ],
)
def test_a_state_stored_by_another_rule(before, after):
  tx = optax_mp.compressed(optax.adam(1e-3), before)
  other = optax_mp.compressed(optax.adam(1e-3), after)
  params = _params()
  message = r"`state` has .* at '0/.u/embed', but .* there: rule.*`init`"
  with pytest.raises(ValueError, match=message):
    jax.jit(other.update)(params, tx.init(params), params)


def test_a_state_of_another_shape_or_min_size():
  tx = optax_mp.compressed(optax.adam(1e-3), SPLIT, min_size=0)
  state = tx.init(_params())
  tall = jax.tree.map(lambda p: jnp.ones((4, *p.shape)), _params())
  with pytest.raises(ValueError, match=r'`state` has .*\(64, 64\)'):
    tx.update(tall, state, tall)
  other = optax_mp.compressed(optax.adam(1e-3), SPLIT, min_size=4096)
  with pytest.raises(ValueError, match="at '0/mu/layer/bias', but no format"):
    other.update(_params(), state, _params())


def test_the_state_of_something_else():
  tx = optax_mp.compressed(optax.adam(1e-3), SPLIT)
  state = tx.init(_params()).inner_state
  with pytest.raises(ValueError, match='`state` must be the CompressedState'):
    tx.update(_params(), state, _params())


def test_parameters_of_another_structure():
  tx = optax_mp.compressed(optax.adam(1e-3), SPLIT)
  params = _params()
  with pytest.raises(ValueError, match='`params` does not have the structure'):
    tx.update(params, tx.init(params), {'embed': params['embed']})


def test_strict_promotion():
  params = _params(jnp.bfloat16)
  grads = _params()
  tx = optax_mp.compressed(optax.trace(0.9), SPLIT)
  with jax.numpy_dtype_promotion('strict'):
    updates, _ = tx.update(grads, tx.init(params), params)
  assert updates['embed'].dtype == jnp.float32


@pytest.mark.parametrize('format', [SPLIT, formats.BlockInt(8)])
def test_structure_changed_since_init(format):
  tx = optax_mp.compressed(optax.adam(1e-3), format)
  state = tx.init(_params())
  other = {'embed': jnp.ones((64, 64))}
  with pytest.raises(
    ValueError, match='`state` does not have the structure.*`init`'
  ):
    tx.update(other, state, other)


def test_random_noise_is_new_for_each_leaf_and_step():
  rule = formats.BFloat16('stochastic')
  tx = optax_mp.compressed(optax.trace(0.9), rule, min_size=0)
  params = {'a': jnp.full(1000, 1.001), 'b': jnp.full(1000, 1.001)}
  _, first = tx.update(params, tx.init(params))
  trace = first.inner_state.trace
  assert np.any(trace['a'] != trace['b'])
  _, again = tx.update(
    params, tx.init(params)._replace(noise_count=first.noise_count)
  )
  assert np.any(trace['a'] != again.inner_state.trace['a'])


@pytest.mark.parametrize(
  'format',
  [
    formats.Affine(),
    formats.Affine(8),
    formats.ErrorFeedback(formats.BFloat16(), formats.Affine(4)),
  ],
  ids=str,
)
@pytest.mark.parametrize('inner', [optax.adam, optax.lion])
def test_a_moment_needs_an_exact_zero(format, inner):
  """A zero that comes back as a rounding error would be divided."""
  field = 'nu' if inner is optax.adam else 'mu'
  for rule in (format, {field: format}, lambda path, leaf: format):
    tx = optax_mp.compressed(inner(1e-3), rule, min_size=0)
    with pytest.raises(ValueError, match='`rule` gives .*no exact zero'):
      tx.init(_params())


def test_what_is_added_up_alone_needs_none():
  tx = optax_mp.compressed(optax.trace(0.9), formats.Affine(8), min_size=0)
  _, state = tx.update(_params(), tx.init(_params()))
  assert formats.is_stored(state.inner_state.trace['embed'])
