# SPDX-License-Identifier: Apache-2.0
"""States out of dictionaries and lists, and states of version 0.1.0."""

from collections.abc import Mapping

import chex
import flax
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import checkpoint
from optax_mp import formats
import states

NAMES = tuple(states.ROWS)
STORED = [name for name in NAMES if name != 'adamw']
# Orbax says so where it is not told on which devices arrays shall be.
ANYWHERE = pytest.mark.filterwarnings('ignore:Sharding info not provided')


def plain_containers(tree, number=int):
  """What is left of a state where only names and order are kept.

  Args:
    tree: a state.
    number: makes the key of what has no name; None: a list.
  """
  if hasattr(tree, '_fields'):
    parts = zip(tree._fields, tree, strict=True)
    return {k: plain_containers(x, number) for k, x in parts}
  if isinstance(tree, Mapping):
    return {k: plain_containers(x, number) for k, x in tree.items()}
  if isinstance(tree, tuple) and number is None:
    return [plain_containers(x, number) for x in tree]
  if isinstance(tree, tuple):
    return {number(i): plain_containers(x, number) for i, x in enumerate(tree)}
  return tree


@pytest.mark.parametrize('name', NAMES)
def test_flax_bytes_without_a_target(name):
  """Exact."""
  params, state = states.saved(name)
  data = flax.serialization.to_bytes(state)
  tree = flax.serialization.msgpack_restore(data)
  assert_rebuilt(name, params, tree, state)


@pytest.mark.parametrize('number', [int, str, None], ids=str)
def test_containers(number):
  """Exact: numbers or texts as keys, lists in place of tuples."""
  for name in ('8bit', 'feedback', 'rank1', 'factored'):
    params, state = states.saved(name)
    assert_rebuilt(name, params, plain_containers(state, number), state)
    assert_rebuilt(name, params, state, state)


def assert_rebuilt(name, params, tree, state, **kwargs):
  like = jax.eval_shape(lambda: params)
  rebuilt = checkpoint.rebuild(states.tx_of(name), like, tree, **kwargs)
  chex.assert_trees_all_equal_structs(rebuilt, state)
  states.assert_same_bits(rebuilt, state)


@ANYWHERE
def test_orbax_without_a_target(tmp_path):
  """Exact, int4 and fp8 among the arrays."""
  ocp = pytest.importorskip('orbax.checkpoint')
  with ocp.PyTreeCheckpointer() as checkpointer:
    for name in ('8bit', '4bit', 'coat', 'feedback', 'bf16-0'):
      params, state = states.saved(name)
      checkpointer.save(tmp_path / name, state)
      tree = checkpointer.restore(tmp_path / name)
      assert_rebuilt(name, params, tree, state)


class Model(nnx.Module):
  """The parameters of a state."""

  def __init__(self, params):
    self.w, self.b = nnx.Param(params['w']), nnx.Param(params['b'])


@ANYWHERE
@pytest.mark.parametrize('name', ['8bit', 'feedback', 'rank1'])
def test_flax_nnx(name, tmp_path):
  """A pure dictionary, a State and what Orbax makes of one, are one state."""
  ocp = pytest.importorskip('orbax.checkpoint')
  model, tx = Model(states.tree(0, jnp.bfloat16)), states.tx_of(name)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  optimizer.update(model, nnx.state(model, nnx.Param))
  state = nnx.state(optimizer.opt_state)
  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', state)
    trees = [
      state,
      nnx.to_pure_dict(state),
      optimizer.opt_state,
      checkpointer.restore(tmp_path / 'state'),
    ]
  params = {'w': model.w.get_value(), 'b': model.b.get_value()}
  expected = checkpoint.rebuild(tx, params, trees[0])
  chex.assert_trees_all_equal_structs(expected, tx.init(params))
  for tree in trees[1:]:
    assert_rebuilt(name, params, tree, expected)
  # And in the model's own containers.
  variables = nnx.state(model, nnx.Param)
  again = checkpoint.rebuild(tx, variables, trees[1])
  chex.assert_trees_all_equal_structs(again, tx.init(variables))


def version_0(state):
  """What version 0.1.0 had: fields without names, and lone arrays."""

  def old(node):
    if isinstance(node, optax.EmptyState) or not formats.is_stored(node):
      return node
    if len(node) == 0:
      return optax.EmptyState()
    parts = [version_0(x) if isinstance(x, tuple) else x for x in node]
    return parts[0] if len(parts) == 1 else plain_type(node)(*parts)

  return jax.tree.map(old, state, is_leaf=states.is_stored)


def plain_type(node):
  """The type without the format's name."""
  types = [t for t in type(node).__mro__ if hasattr(t, '_fields')]
  return next(t for t in types if not any('__' in f for f in t._fields))


@pytest.mark.parametrize('name', STORED)
def test_version_0_is_refused_by_name(name):
  """By `update`, while it is traced, and by `rebuild`."""
  tx, (params, state) = states.tx_of(name), states.saved(name)
  old = version_0(state)
  assert not any('__' in name for name in checkpoint.to_arrays(old))
  with pytest.raises(ValueError) as error:
    jax.eval_shape(tx.update, params, old, params)
  assert 'version 0.1.0' in str(error.value)
  assert 'unnamed=True' in str(error.value)
  with pytest.raises(ValueError, match='version 0.1.0.*unnamed=True'):
    checkpoint.rebuild(tx, params, old)


@pytest.mark.parametrize('name', NAMES)
def test_version_0_is_migrated(name):
  """Exact: whatever containers it comes in."""
  params, state = states.saved(name)
  old = version_0(state)
  assert_rebuilt(name, params, old, state, unnamed=True)
  tree = plain_containers(old, str)
  assert_rebuilt(name, params, tree, state, unnamed=True)
  # Who has names already is what it was.
  assert_rebuilt(name, params, state, state, unnamed=True)


def test_flax_refuses_version_0():
  params, state = states.saved('8bit')
  data = flax.serialization.to_bytes(version_0(state))
  with pytest.raises(ValueError, match='scales.*scales__BlockInt_8.*_v2'):
    flax.serialization.from_bytes(state, data)
  del params


def test_another_version_of_a_format():
  params, state = states.saved('8bit')
  tree = plain_containers(state)
  kept = tree['inner_state']['inner_state'][0]['mu']['w']
  name = next(key for key in kept if '__' in key)
  kept[name.replace('_v2', '_v3')] = kept.pop(name)
  match = 'BlockInt_8.*_v3 at .*mu/w.*BlockInt_8.*_v2'
  with pytest.raises(ValueError, match=match):
    checkpoint.rebuild(states.tx_of('8bit'), params, tree)


@pytest.mark.parametrize(
  ('old', 'new', 'match'),
  [
    ('8bit', '4bit', 'BlockInt_8_.*mu/w.*BlockInt_4_.*convert'),
    ('bf16-16', 'bf16-8', "Split_16_v2 at 'residual/b'.*Split_8_v2.*convert"),
    ('bf16-16', 'bf16-0', "'residual/b/low__Split_16_v2'.*has none"),
    ('bf16-0', 'bf16-16', "no Split_16_v2 at 'residual/b'"),
    ('8bit', 'bfloat16', 'BlockInt_8_.* at .*mu/w.*bfloat16\\(16, 256\\)'),
    ('bfloat16', '8bit', 'bfloat16\\(16, 256\\).*mu/w.*BlockInt_8_.*sqrt_log'),
    ('bfloat16', 'float32', 'bfloat16.*mu/w.*float32.*dtypes that were saved'),
    ('8bit', 'adamw', "no int32.* at '0/count'"),
    ('adamw', '8bit', 'convert'),
  ],
)
def test_other_formats(old, new, match):
  params, state = states.tree(0, states.ROWS[new].dtype), states.saved(old)[1]
  with pytest.raises(ValueError, match=match):
    checkpoint.rebuild(states.tx_of(new), params, state)


def test_missing_extra_and_renamed_leaves():
  tx, (params, state) = states.tx_of('8bit'), states.saved('8bit')
  tree = plain_containers(state)
  tree['inner_state']['inner_state'][0].pop('count')
  with pytest.raises(ValueError, match='no int32.*inner_state/0/count'):
    checkpoint.rebuild(tx, params, tree)
  tree = plain_containers(state) | {'more': np.zeros(3)}
  with pytest.raises(ValueError, match="array 'more', but a state of `tx` has"):
    checkpoint.rebuild(tx, params, tree)
  renamed = {'v': params['w'], 'b': params['b']}
  with pytest.raises(ValueError, match='mu/v'):
    checkpoint.rebuild(tx, renamed, state)


def test_other_shapes_and_dtypes():
  tx, (params, state) = states.tx_of('8bit'), states.saved('8bit')
  with pytest.raises(
    ValueError, match=r'int8\(16, 256\).*codes.*int8\(32, 256'
  ):
    wide = params | {'w': jnp.zeros((32, 256), jnp.bfloat16)}
    checkpoint.rebuild(tx, wide, state)
  tree = plain_containers(state)
  adam = tree['inner_state']['inner_state'][0]
  adam['mu']['w']['codes'] = adam['mu']['w']['codes'].astype(jnp.int32)
  with pytest.raises(ValueError, match=r'int32\(16, 256\).*int8'):
    checkpoint.rebuild(tx, params, tree)


def test_names_of_parameters_that_look_like_formats():
  """Exact: what names a format is known from the state's tree."""
  params = {
    'scales__x_v2': jnp.ones((16, 256), jnp.bfloat16),
    'value': {'low': jnp.ones((16, 256), jnp.bfloat16)},
  }
  tx = optax_mp.adamw_8bit(1e-2)
  state = tx.init(params)
  for old, unnamed in ((state, False), (version_0(state), True)):
    tree = plain_containers(old, str)
    rebuilt = checkpoint.rebuild(tx, params, tree, unnamed=unnamed)
    chex.assert_trees_all_equal_structs(rebuilt, state)
    states.assert_same_bits(rebuilt, state)
