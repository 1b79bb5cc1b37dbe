# SPDX-License-Identifier: Apache-2.0
"""`memory.plan`: bytes from shapes."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_mp
from optax_mp import formats
from optax_mp import memory


def _shape(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def _rows(plan):
  return {(r.field, r.format): (r.values, r.bytes) for r in plan.rows}


def test_rows_of_a_mixed_tree():
  """Exact: counted by hand."""
  params = {
    'kernel': _shape(128, 64),
    'bias': _shape(64),
    'scale': _shape(64, dtype=jnp.float32),
  }
  plan = memory.plan(optax_mp.adamw_bf16(1e-3, residual_bits=8), params)
  assert _rows(plan) == {
    ('params', 'bfloat16'): (8192 + 64, 2 * (8192 + 64)),
    ('params', 'float32'): (64, 4 * 64),
    ('count', 'int32'): (1, 4),
    ('mu', 'bfloat16 + uint8'): (8192, 3 * 8192),
    ('mu', 'float32'): (128, 4 * 128),
    ('nu', 'bfloat16 + uint8'): (8192, 3 * 8192),
    ('nu', 'float32'): (128, 4 * 128),
    ('noise_count', 'uint32'): (2, 8),
    ('residual', 'uint8'): (8192 + 64, 8192 + 64),
    ('gradients', 'bfloat16'): (8256, 2 * 8256),
    ('gradients', 'float32'): (64, 4 * 64),
  }
  assert plan.num_params == 8320
  assert plan.total_bytes == sum(r.bytes for r in plan.rows)
  assert plan.bytes_per_param == pytest.approx(plan.total_bytes / 8320)


@pytest.mark.parametrize(
  'tx, expected',
  [
    (optax.adamw(1e-3), 2 + 2 + 2 + 2),
    (optax_mp.adamw_bf16(1e-3), 2 + 2 + 3 + 3 + 2),
    (optax_mp.adamw_bf16(1e-3, residual_bits=8), 2 + 1 + 3 + 3 + 2),
    (optax_mp.adamw_bf16(1e-3, residual_bits=0), 2 + 0 + 3 + 3 + 2),
    (optax_mp.sgdm_bf16(0.1), 2 + 2 + 3 + 2),
    (optax_mp.lion_bf16(1e-4, residual_bits=8), 2 + 1 + 3 + 2),
  ],
)
def test_bytes_per_parameter(tx, expected):
  """Exact, but for the keys and the step count of a few bytes."""
  plan = memory.plan(tx, {'w': _shape(4096, 4096)})
  assert 0 <= plan.bytes_per_param - expected < 64 / 4096**2


def test_gradients_have_a_dtype_or_are_never_whole():
  params = {'w': _shape(64, 64)}
  tx = optax_mp.lion_bf16(1e-4)
  size = [
    memory.plan(tx, params, gradients).total_bytes
    for gradients in (None, jnp.bfloat16, jnp.float32)
  ]
  assert size[1] - size[0] == 2 * 4096
  assert size[2] - size[0] == 4 * 4096


def test_gradients_follow_other_parameters():
  params = {
    'full': _shape(10, dtype=jnp.float32),
    'complex': _shape(10, dtype=jnp.complex64),
    'steps': _shape(10, dtype=jnp.int32),
  }
  plan = memory.plan(optax.set_to_zero(), params)
  assert _rows(plan)['gradients', 'float32'] == (10, 40)
  assert _rows(plan)['gradients', 'complex64'] == (10, 80)
  assert ('gradients', 'int32') not in _rows(plan)
  with pytest.raises(ValueError, match='`gradients` must be a dtype or None'):
    memory.plan(optax.set_to_zero(), params, 'bf16')


def test_typed_keys_in_the_state():
  tx = optax.add_noise(0.1, 0.5, jax.random.key(0))
  rows = memory.plan(tx, _shape(3), None).rows
  assert {r.field: r.bytes for r in rows}['rng_key'] == 8


def test_sums_count_bits_not_nbytes():
  """Exact: an int4 is half a byte, although numpy says one."""

  def init(params):
    return optax.TraceState(jnp.zeros(params.shape, jnp.int4))

  tx = optax.GradientTransformation(init, lambda u, s, p=None: (u, s))
  plan = memory.plan(tx, _shape(3, 5), gradients=None)
  (row,) = [r for r in plan.rows if r.field == 'trace']
  assert (row.bits, row.bytes, row.bits_per_value) == (60, 8, 4.0)
  assert plan.total_bytes == (15 * 16 + 60 + 7) // 8


def test_seventy_billion_parameters_take_no_time():
  """Exact: 80 unstacked layers of 10 arrays trace a format once a shape.

  Nothing is allocated, or this machine would not answer.
  """
  layer = {f'w{i}': _shape(8192, 8192) for i in range(8)}
  layer |= {'mlp': _shape(8192, 41_000), 'norm': _shape(8192)}
  params = {f'layer_{i}': layer for i in range(80)}
  tx = optax_mp.adamw_bf16(1e-4, weight_decay=0.1)
  plan = memory.plan(tx, params)
  assert plan.num_params > 69e9
  assert plan.bytes_per_param == pytest.approx(12, abs=0.01)

  traced = []

  @dataclasses.dataclass(frozen=True)
  class Counting(formats.Split):
    def encode(self, x, key=None):
      traced.append(x.shape)
      return super().encode(x, key)

  memory.plan(optax_mp.compressed(optax.adam(1e-4), Counting(8)), params)
  assert sorted(traced) == [(8192,), (8192, 8192), (8192, 41_000)]


def test_every_wrapper_has_its_own_choices():
  """And they stand there however often, and whatever else, was traced."""
  params = {'w': _shape(64, 128)}
  tx = optax.chain(
    optax_mp.compressed(optax.scale_by_adam(), formats.BlockInt(8)),
    optax_mp.compressed(optax.trace(0.9), lambda path, leaf: formats.Split(8)),
  )
  state = jax.eval_shape(tx.init, params)
  for _ in range(2):
    chosen = [
      (x.path, x.bits_per_value) for x in memory.plan(tx, params).leaves
    ]
    assert chosen == [('mu/w', 8.25), ('nu/w', 8.25), ('trace/w', 24.0)]
  chex.assert_trees_all_equal_structs(jax.eval_shape(tx.init, params), state)


def test_says_why_a_leaf_is_kept_so():
  params = {'a': _shape(100, 96), 'b': _shape(64), 'head': _shape(64, 128)}
  tx = optax_mp.sgdm_8bit(0.1, keep_float32='head')
  plan = memory.plan(tx, params)
  assert {x.path.split('/')[-1]: x.note for x in plan.leaves} == {
    'a': 'one scale a row: 96 is no multiple of 128',
    'b': 'fewer than min_size=4096 values',
    'head': "kept by 'head'",
  }
  text = plan.by_leaf()
  assert all(x.note in text and x.path in text for x in plan.leaves)


def test_works_for_any_transformation():
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.masked(optax.adafactor(1e-3), {'w': True, 'b': False}),
  )
  plan = memory.plan(tx, {'w': _shape(256, 256), 'b': _shape(256)})
  assert {'params', 'v_row', 'v_col', 'gradients'} < {
    r.field for r in plan.rows
  }
  assert memory.plan(tx, {'w': {}, 'b': {}}).bytes_per_param == 0.0


def test_prints_a_table():
  text = str(memory.plan(optax_mp.sgdm_bf16(0.1), {'w': _shape(64, 64)}))
  lines = text.splitlines()
  assert lines[0].split() == [
    'field', 'format', 'bits/value', 'bytes', 'bytes/param'
  ]  # fmt: skip
  assert lines[-1].split() == ['total', str(9 * 4096 + 8), '9.00']
  assert len({len(line) for line in lines}) == 1


def test_members_of_a_vmap_are_counted():
  """Exact: a format is chosen for one of them, and stores all."""
  one = optax_mp.adamw_8bit(1e-3)
  tx = optax.GradientTransformation(jax.vmap(one.init), jax.vmap(one.update))
  params = {'w': jnp.ones((8, 64, 128), jnp.bfloat16)}
  stored = memory.plan(tx, params).rows
  bits = {row.field: row.bits / row.values for row in stored}
  assert bits['mu'] == bits['nu'] == 8.25
