# SPDX-License-Identifier: Apache-2.0
"""Rules over trees, what they refuse, and formats made of formats."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_mp import formats
from optax_mp.formats import _base
from optax_mp.formats import _paths
from optax_mp.formats import _rule

SPLIT = formats.Split(16)
NEAR = formats.Split(8)
KEY = jax.random.key(0)
ONES = np.ones(2, np.float32)


class Moments(NamedTuple):
  """A state as Optax writes it."""

  count: Any
  mu: Any
  nu: Any


def params():
  x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
  return {'layer': {'kernel': x, 'bias': x[0]}}


def state():
  p = params()
  return (
    Moments(np.array(3, np.int32), p, jax.tree.map(np.square, p)),
    optax.EmptyState(),
    {'scale': np.array(1.5, np.float32), 'mask': np.array([True, False])},
  )


def stored_paths(tree, rule, **kwargs):
  """Paths of the leaves that a rule gives a format; shapes only."""
  stored = jax.eval_shape(
    lambda tree: formats.encode_tree(tree, rule, **kwargs), tree
  )
  leaves = jax.tree_util.tree_leaves_with_path(
    stored, is_leaf=formats.is_stored
  )
  return {_paths.path_str(p) for p, leaf in leaves if formats.is_stored(leaf)}


FLOATS = {
  *(f'0/{m}/layer/{k}' for m in ('mu', 'nu') for k in ('kernel', 'bias')),
  '2/scale',
}


def test_a_format_is_for_every_floating_leaf():
  assert stored_paths(state(), SPLIT) == FLOATS


@pytest.mark.parametrize(
  'rule',
  [
    SPLIT,
    {'mu': SPLIT, 'nu': SPLIT},
    {'mu': SPLIT, 'nu': None},
    lambda path, leaf: SPLIT if path.endswith('kernel') else None,
    lambda path, leaf: None,
    {},
  ],
  ids=['format', 'fields', 'none', 'function', 'nothing', 'no-field'],
)
@pytest.mark.parametrize('min_size', [0, 9, 1000])
def test_round_trip_is_exact(rule, min_size):

  @jax.jit
  def there_and_back(tree):
    stored = formats.encode_tree(tree, rule, min_size=min_size)
    like = jax.eval_shape(lambda: tree)
    return formats.decode_tree(stored, like, rule, min_size=min_size)

  seen = there_and_back(state())
  chex.assert_trees_all_equal_structs(seen, state())
  chex.assert_trees_all_equal_shapes_and_dtypes(seen, state())
  chex.assert_trees_all_equal(seen, state())


def test_a_mapping_goes_by_fields():
  paths = {'0/mu/layer/kernel', '0/mu/layer/bias'}
  assert stored_paths(state(), {'mu': SPLIT, 'nu': None}) == paths
  assert stored_paths(state(), {'mu': SPLIT}) == paths


def test_a_mapping_takes_the_outermost_field():
  """Below it, a parameter of the same name is no state field."""
  inner = Moments(None, ONES, ONES)
  tree = Moments(None, inner, inner)
  assert stored_paths(tree, {'mu': None, 'nu': SPLIT}) == {'nu/mu', 'nu/nu'}
  with pytest.raises(ValueError, match='names the state fields ..mu..; got'):
    stored_paths({'mu': ONES}, {'mu': SPLIT})


def test_a_mapping_looks_through_containers():
  tree = [{'a': (Moments(None, ONES, ONES),)}]
  assert stored_paths(tree, {'nu': SPLIT}) == {'0/a/0/nu'}


def test_a_function_sees_paths_and_leaves():
  seen = {}

  def rule(path, leaf):
    seen[path] = leaf.shape, leaf.dtype
    return SPLIT if len(leaf.shape) == 2 else None

  paths = {'0/mu/layer/kernel', '0/nu/layer/kernel'}
  assert stored_paths(state(), rule) == paths
  assert set(seen) == FLOATS
  assert seen['0/mu/layer/kernel'] == ((4, 8), jnp.float32)


@pytest.mark.parametrize(
  ('min_size', 'kept'), [(8, {'kernel', 'bias'}), (9, {'kernel'}), (33, set())]
)
def test_min_size_counts_values(min_size, kept):
  tree = params()['layer']
  assert stored_paths(tree, SPLIT, min_size=min_size) == kept


@pytest.mark.parametrize(
  'leaf',
  [
    np.arange(4),
    np.array([True, False]),
    np.arange(3, dtype=np.uint8),
    jax.random.key(1),
  ],
  ids=['int', 'bool', 'uint8', 'key'],
)
def test_what_is_no_float_is_left_alone(leaf):
  assert formats.encode_tree([leaf], SPLIT)[0] is leaf
  assert formats.decode_tree([leaf], [leaf], SPLIT)[0] is leaf


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_come_back(dtype):
  tree = jax.tree.map(lambda x: x.astype(dtype), params())
  seen = formats.decode_tree(formats.encode_tree(tree, SPLIT), tree, SPLIT)
  chex.assert_trees_all_equal_shapes_and_dtypes(seen, tree)
  chex.assert_trees_all_equal(seen, tree)


def test_empty_trees():
  for tree in ({}, (), None, {'a': None}):
    stored = formats.encode_tree(tree, SPLIT, KEY)
    chex.assert_trees_all_equal_structs(stored, tree)
    formats.decode_tree(stored, tree, SPLIT)


def test_leaves_draw_their_own_noise():
  """Leaves alike differ; a key gives the same noise again; none is refused."""
  rule = formats.BFloat16('stochastic')
  x = jnp.full(256, 1.001)
  first = formats.encode_tree({'a': x, 'b': x}, rule, KEY)
  chex.assert_trees_all_equal(
    first, formats.encode_tree({'a': x, 'b': x}, rule, KEY)
  )
  assert np.any(np.asarray(first['a'] != first['b']))
  with pytest.raises(ValueError, match='`key` is None.*`jax.random.key`'):
    formats.encode_tree({'a': x}, rule)


def test_under_jit_and_eval_shape():
  rule = {'mu': NEAR, 'nu': SPLIT}

  def there_and_back(tree):
    return formats.decode_tree(formats.encode_tree(tree, rule), tree, rule)

  chex.assert_trees_all_equal(
    jax.jit(there_and_back)(state()), there_and_back(state())
  )
  chex.assert_trees_all_equal_shapes_and_dtypes(
    jax.eval_shape(there_and_back, state()), state()
  )


UNKNOWN = {
  'string': ('split', 'rule', "'split'"),
  'number': (8, 'rule', '8'),
  'none': (None, 'rule', 'None'),
  'class': (formats.Split, 'rule', 'Split'),
  'value': ({'mu': 'split'}, "rule['mu']", "'split'"),
  'value-class': ({'mu': formats.Split}, "rule['mu']", 'Split'),
  'returned': (lambda path, leaf: 'split', "rule('0/mu/", "'split'"),
  'returned-class': (lambda path, leaf: formats.Split, 'rule(', 'Split'),
}


@pytest.mark.parametrize(('rule', 'name', 'got'), UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize('function', ['encode', 'decode'])
def test_unknown_rules_are_refused(rule, name, got, function):
  """With the argument's name, what it got, and a way out."""
  with pytest.raises(ValueError) as caught:
    if function == 'encode':
      formats.encode_tree(state(), rule)
    else:
      formats.decode_tree(state(), state(), rule)
  message = str(caught.value)
  assert message.startswith(f'`{name}')
  assert 'got ' in message and got in message.split('got ')[1]
  assert 'formats.Split(8)' in message


@pytest.mark.parametrize(
  'rule', [SPLIT, {'mu': SPLIT, 'nu': None}, {}, lambda path, leaf: 'any']
)
def test_check_rule_accepts(rule):
  """What a function returns is seen only where it is called."""
  _rule.check_rule(rule)


@pytest.mark.parametrize(
  'stored',
  [
    {'layer': {'kernel': 1}},
    {'layer': {'kernel': 1, 'bias': 1, 'more': 1}},
    {'other': 1},
    [1],
    (),
    None,
  ],
  ids=['missing', 'more', 'other', 'list', 'tuple', 'none'],
)
def test_another_structure_is_refused(stored):
  with pytest.raises(ValueError, match='`stored`.*structure of `like`') as it:
    formats.decode_tree(stored, params(), SPLIT)
  assert 'got ' in str(it.value) and 'call `init` again' in str(it.value)
  assert it.value.__cause__ is not None


def test_is_stored():
  feedback = formats.ErrorFeedback(formats.BFloat16(), NEAR)
  stored = jax.eval_shape(SPLIT.encode, ONES)
  both = jax.eval_shape(feedback.encode, ONES)
  assert formats.is_stored(stored) and formats.is_stored(both)
  assert not formats.is_stored(both.value) and formats.is_stored(both.residual)
  others = [ONES, 1.0, None, (1, 2), {'high': 1, 'low': 2}, state()[0]]
  assert not any(map(formats.is_stored, others))
  assert len(jax.tree.leaves([stored, both], is_leaf=formats.is_stored)) == 2
  assert len(jax.tree.leaves([stored, both])) == 5


def test_bits_per_value_of_plain_float32_and_nothing():
  assert formats.bits_per_value(None, (3, 5)) == 32
  assert formats.bits_per_value(None, ()) == 32
  assert formats.bits_per_value(NEAR, ()) == 24
  assert formats.bits_per_value(NEAR, (0,)) == 0


@pytest.mark.parametrize(
  ('dtype', 'bits'),
  [
    ('int4', 4),
    ('uint8', 8),
    ('bool', 8),
    ('bfloat16', 16),
    ('float8_e4m3fn', 8),
  ]
  + [('float32', 32), ('int16', 16)],
)
def test_bits_of_a_dtype(dtype, bits):
  array = jax.ShapeDtypeStruct((3, 5), jnp.dtype(dtype))
  assert _base.array_bits(array) == 15 * bits


def test_feedback_is_the_formats_it_is_made_of():
  """Exact: value and residual are what the two formats store."""
  x = jnp.asarray(params()['layer']['kernel'])
  outer, inner = formats.BFloat16(), NEAR
  stored = formats.ErrorFeedback(outer, inner).encode(x)
  chex.assert_trees_all_equal(stored.value, outer.encode(x))
  error = x - outer.decode(outer.encode(x), x)
  chex.assert_trees_all_equal(stored.residual, inner.encode(error))


def test_feedback_in_feedback():
  """Three bfloat16s hold 24 bits: each takes 8 from what the last one left.

  Exact, in the range in which no residual is subnormal.
  """
  bf16 = formats.BFloat16()
  format = formats.ErrorFeedback(bf16, formats.ErrorFeedback(bf16, bf16))
  x = params()['layer']['kernel']
  seen = jax.jit(lambda x: format.decode(format.encode(x), x))(x)
  chex.assert_trees_all_equal(seen, x)
  assert formats.bits_per_value(format, x.shape) == 48
  assert formats.is_stored(jax.eval_shape(format.encode, x).residual)


def test_feedback_draws_apart():
  """The two formats round with noises of their own."""
  noisy = formats.BFloat16('stochastic')
  n = 2**14
  x = np.full(n, 1 + 2.0**-8 + 2.0**-17, np.float32)
  stored = jax.jit(formats.ErrorFeedback(noisy, noisy).encode)(x, KEY)
  value, residual = (np.asarray(x, np.float32) for x in stored)
  for each in (1.0, 1 + 2.0**-7):
    assert len(np.unique(residual[value == each])) == 2


@pytest.mark.parametrize(
  ('arguments', 'name'),
  [
    (('bf16', SPLIT), 'format'),
    ((SPLIT, None), 'residual'),
    ((formats.BFloat16, SPLIT), 'format'),
    ((SPLIT, formats.BFloat16), 'residual'),
  ],
)
def test_feedback_refuses_what_is_no_format(arguments, name):
  with pytest.raises(ValueError, match=f'`{name}` must be a format.*; got '):
    formats.ErrorFeedback(*arguments)


@pytest.mark.parametrize(
  ('make', 'name'),
  [
    (lambda bits: formats.Split(bits), 'residual_bits'),
    (lambda bits: formats.SplitFloat16(bits), 'residual_bits'),
    (lambda bits: formats.BFloat16(bits), 'rounding'),
  ],
  ids=['split', 'split-float16', 'bfloat16'],
)
def test_traced_choices_are_refused(make, name):
  """As `optax.inject_hyperparams` passes numbers: the way out is its own."""

  @jax.jit
  def build(bits):
    make(bits)
    return bits

  with pytest.raises(ValueError, match=f'`{name}`.*`static_args`'):
    build(8)
  with pytest.raises(ValueError, match=f'`{name}`.*`static_args`'):
    make(jnp.array(8))


def test_formats_of_ones_own():
  """Two methods and a registered NamedTuple: nothing else is asked for."""

  @formats.Stored.register
  class Scaled(NamedTuple):
    codes: jax.Array
    scale: jax.Array

  class Halves:
    def encode(self, x, key=None):
      return Scaled(x / 2, jnp.float32(2))

    def decode(self, stored, like):
      return (stored.codes * stored.scale).astype(like.dtype)

  assert isinstance(Halves(), formats.Format)
  assert stored_paths(params(), Halves()) == {'layer/kernel', 'layer/bias'}
  stored = formats.encode_tree(params(), Halves())
  seen = formats.decode_tree(stored, params(), Halves())
  chex.assert_trees_all_equal(seen, params())
