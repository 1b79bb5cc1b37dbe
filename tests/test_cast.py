# SPDX-License-Identifier: Apache-2.0
"""Parameters in 16 bits, whatever tree they are in."""

from typing import Any, NamedTuple

import chex
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import ml_dtypes
import numpy as np
import pytest

import optax_mp
from optax_mp import formats

BF16 = jnp.bfloat16


class Pair(NamedTuple):
  kernel: Any
  bias: Any


def dtypes(tree):
  return jax.tree.map(lambda x: str(x.dtype), tree)


@pytest.mark.parametrize('dtype', [BF16, 'float16', np.float32])
def test_floats_alone(dtype):
  """kind: exact."""
  key = jax.random.key(0)
  same = {
    'key': key,
    'steps': jnp.arange(3),
    'mask': jnp.array([True, False]),
    'complex': jnp.ones(2, jnp.complex64),
    'fp8': jnp.ones(2, jnp.float8_e4m3fn),
    'rate': 0.1,
    'name': 'a string',
    'call': jnp.tanh,
    'none': None,
    'stored': formats.BlockInt(8).encode(jnp.ones(3)),
  }
  floats = {
    'dict': [jnp.ones((2, 3)), (jnp.ones(()), jnp.ones((0,)))],
    'tuple': Pair(jnp.ones(2, BF16), jnp.ones(2, jnp.float16)),
  }
  new = optax_mp.cast({'same': same, 'floats': floats}, dtype)
  assert jax.tree.structure(new['same']) == jax.tree.structure(same)
  for x, old in zip(*map(jax.tree.leaves, (new['same'], same)), strict=True):
    assert x is old
  assert isinstance(new['floats']['tuple'], Pair)
  assert {x.dtype for x in jax.tree.leaves(new['floats'])} == {jnp.dtype(dtype)}
  chex.assert_trees_all_equal_shapes(new['floats'], floats)


def test_kept_by_path():
  params = {'norm': {'scale': jnp.ones(3)}, 'in/x': [jnp.ones(3), jnp.ones(3)]}
  new = optax_mp.cast(params, keep_float32='norm/|x/1$')
  assert dtypes(new) == {
    'norm': {'scale': 'float32'},
    'in/x': ['bfloat16', 'float32'],
  }


def test_numpy_and_shapes():
  x = np.ones(3, np.float32)
  assert isinstance(optax_mp.cast(x), np.ndarray)
  assert optax_mp.cast(x).dtype == ml_dtypes.bfloat16
  shape = jax.ShapeDtypeStruct((3, 4), jnp.float32)
  assert optax_mp.cast(shape) == jax.ShapeDtypeStruct((3, 4), BF16)
  assert jax.eval_shape(optax_mp.cast, shape).dtype == BF16
  assert optax_mp.cast({}) == {} and optax_mp.cast(None) is None


def test_a_sharded_array_stays_where_it_is(mesh):
  spec = jax.NamedSharding(mesh, PartitionSpec('d'))
  x = jax.device_put(jnp.ones((16, 4)), spec)
  assert optax_mp.cast(x).sharding.is_equivalent_to(spec, 2)
  shape = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=spec)
  assert optax_mp.cast(shape).sharding == spec


class Model(nnx.Module):
  def __init__(self, rngs):
    names = {'out_sharding': (None, 'd')}
    init = nnx.with_metadata(nnx.initializers.ones_init(), **names)
    self.linear = nnx.Linear(4, 8, rngs=rngs)
    self.named = nnx.Param(init(rngs.params(), (4, 8)), tag='mine')
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)


def a_model():
  auto = (jax.sharding.AxisType.Auto,)
  with jax.set_mesh(jax.make_mesh((1,), ('d',), axis_types=auto)):
    return Model(nnx.Rngs(0))


def test_states_of_nnx():
  model = a_model()
  state = nnx.state(model)
  new = optax_mp.cast(state, keep_float32='^norm/')
  assert isinstance(new, nnx.State)
  assert new['linear']['kernel'].get_value().dtype == BF16
  assert new['norm']['scale'].get_value().dtype == jnp.float32
  assert new['norm']['mean'].get_value().dtype == jnp.float32
  old_named, named = state['named'], new['named']
  assert type(named) is nnx.Param and named.get_value().dtype == BF16
  assert named.get_metadata() == old_named.get_metadata()
  assert named.get_metadata('tag') == 'mine'
  assert jax.tree.structure(new) == jax.tree.structure(state)
  nnx.update(model, new)
  assert model.linear.kernel.get_value().dtype == BF16


def test_paths_of_nnx_end_with_the_name_of_the_parameter():
  state = nnx.state(a_model(), nnx.Param)
  new = optax_mp.cast(state, keep_float32='kernel$')
  assert new['linear']['kernel'].get_value().dtype == jnp.float32
  assert new['linear']['bias'].get_value().dtype == BF16
  with pytest.warns(UserWarning, match="keeps nothing.*'value'"):
    optax_mp.cast(state, keep_float32='value')


@pytest.mark.parametrize('box', [nn.Partitioned, nn.LogicallyPartitioned])
def test_boxes_of_linen(box):
  params = {
    'kernel': box(jnp.ones((4, 8)), names=(None, 'd')),
    'b': jnp.ones(8),
  }
  new = optax_mp.cast(params, keep_float32='^b$')
  assert type(new['kernel']) is box and new['kernel'].names == (None, 'd')
  assert new['kernel'].value.dtype == BF16 and new['b'].dtype == jnp.float32
  kept = optax_mp.cast(params, keep_float32='kernel$')
  assert kept['kernel'].value.dtype == jnp.float32


def test_a_bfloat16_model_trains():
  """As cast by hand: the same bits."""
  params = {'kernel': jax.random.normal(jax.random.key(0), (8, 128))}
  by_hand = jax.tree.map(lambda p: p.astype(BF16), params)
  chex.assert_trees_all_equal(optax_mp.cast(params), by_hand)
  tx = optax_mp.adamw_bf16(1e-3)
  updates, _ = tx.update(by_hand, tx.init(optax_mp.cast(params)), by_hand)
  chex.assert_tree_all_finite(updates)


@pytest.mark.parametrize(
  'dtype', [jnp.int8, 'float8_e4m3fn', 'bool', 'what', None, jnp.complex64]
)
def test_refuses_a_dtype_that_is_no_wide_float(dtype):
  with pytest.raises(ValueError, match='`dtype` must be a float.*got '):
    optax_mp.cast(jnp.ones(2), dtype)


@pytest.mark.parametrize('pattern', ['(', 3])
def test_refuses_a_pattern_that_is_none(pattern):
  with pytest.raises(ValueError, match='`keep_float32` must be a regular'):
    optax_mp.cast(jnp.ones(2), keep_float32=pattern)


def test_says_that_a_pattern_keeps_nothing():
  with pytest.warns(UserWarning, match="`keep_float32` keeps nothing.*'nrm'"):
    optax_mp.cast({'norm': jnp.ones(2)}, keep_float32='nrm')
