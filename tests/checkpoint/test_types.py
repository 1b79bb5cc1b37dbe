# SPDX-License-Identifier: Apache-2.0
"""Types made at run time behave like any NamedTuple of a state."""

import copy
import os
import pathlib
import pickle
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_mp
from optax_mp import formats
import states

ROOT = pathlib.Path(__file__).parents[2]
NAMES = tuple(states.ROWS)
OURS = [name for name in NAMES if name != 'adamw']


@pytest.mark.parametrize('name', NAMES)
def test_copies(name):
  """Exact: types, and arrays, and the types are the very same."""
  state = states.saved(name)[1]
  copies = [
    copy.copy(state),
    copy.deepcopy(state),
    jax.tree.map(jnp.copy, state),
    pickle.loads(pickle.dumps(state)),
    jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state)),
    jax.jit(lambda x: x)(state),
  ]
  for other in copies:
    chex.assert_trees_all_equal_structs(other, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(other, state)
    states.assert_same_bits(other, state)
    assert jax.tree.structure(other) == jax.tree.structure(state)


PROGRAM = """
import pickle, sys
state = pickle.load(open(sys.argv[1], 'rb'))
import jax, jax.numpy as jnp, optax_mp
params = {'w': jnp.zeros((16, 256), jnp.bfloat16)}
tx = optax_mp.adamw_4bit(1e-2)
assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
jax.eval_shape(tx.update, params, state, params)
print(state.inner_state.inner_state[0].mu['w']._fields[-1])
"""


def test_pickle_in_a_new_process(tmp_path):
  """Unpickling imports what it needs, and the types are those of `init`."""
  params = {'w': jnp.zeros((16, 256), jnp.bfloat16)}
  state = optax_mp.adamw_4bit(1e-2).init(params)
  (tmp_path / 'state').write_bytes(pickle.dumps(state))
  out = subprocess.run(
    [sys.executable, '-c', PROGRAM, str(tmp_path / 'state')],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    check=True,
    capture_output=True,
    text=True,
  )
  assert out.stdout.strip() == 'scales__BlockInt_4_signed_softsign_128_block_v2'


@pytest.mark.parametrize('name', OURS)
def test_optax_finds_its_fields(name):
  """`tree_get` finds each of them once, `tree_set` sets them."""
  state = states.saved(name)[1]
  adam = state.inner_state.inner_state[0]
  for field in ('mu', 'nu', 'count'):
    assert optax.tree_utils.tree_get(state, field) is getattr(adam, field)
  changed = optax.tree_utils.tree_set(state, count=jnp.int32(7))
  chex.assert_trees_all_equal_structs(changed, state)
  assert optax.tree_utils.tree_get(changed, 'count') == 7


@pytest.mark.parametrize('name', OURS)
def test_map_params(name):
  """`optax.tree.map_params` reaches what is stored of each parameter."""
  state = states.saved(name)[1]
  tx = states.tx_of(name)
  doubled = optax.tree.map_params(
    tx, lambda x: x, state, is_leaf=formats.is_stored
  )
  chex.assert_trees_all_equal_structs(doubled, state)
  labels = optax.tree.map_params(
    tx,
    lambda x: 'param',
    state,
    transform_non_params=lambda x: 'other',
    is_leaf=formats.is_stored,
  )
  found = jax.tree.leaves(labels)
  assert found.count('param') >= 4 and found.count('other') == 3


def test_short_names_are_kept():
  """`codes`, `scales`, `low`: whoever knew them reads them."""
  _, state = states.saved('8bit')
  mu = state.inner_state.inner_state[0].mu['w']
  assert mu.scales is mu[1] is getattr(mu, mu._fields[1])
  assert mu.codes is mu[0] is mu._asdict()['codes']
  assert mu._replace(codes=mu.codes + 1).scales is mu.scales
  field = mu._fields[1]
  assert mu._replace(**{field: 2 * mu.scales}).scales is not mu.scales
  assert isinstance(mu, type(formats.BlockInt(8).encode(jnp.ones((8, 128)))))
  residual = state.residual['w']
  assert residual.low is residual[0]
  assert repr(mu).startswith('Block[BlockInt_8_signed_sqrt_log_128_block_v2](')


def test_equal_formats_have_one_type():
  """What only `encode` reads has no part in the name."""
  x = states.tree(0, jnp.float32)
  kinds = [
    formats.encode_tree(x, formats.BlockInt(8, rounding=r), jax.random.key(0))
    for r in ('nearest', 'stochastic')
  ]
  assert type(kinds[0]['w']) is type(kinds[1]['w'])
  others = [
    formats.BlockInt(4),
    formats.BlockInt(8, signed=False),
    formats.BlockInt(8, map='linear'),
    formats.BlockInt(8, block_size=64),
    formats.BlockInt(8, scale='rank1'),
    formats.Float8(),
    formats.Float8('e5m2'),
    formats.Float8(expand=False),
    formats.Affine(8),
    formats.Affine(8, stats_dtype='float32'),
    formats.Split(8),
    formats.Split(16),
    formats.SplitFloat16(8),
    formats.ErrorFeedback(formats.BlockInt(8), formats.BlockInt(4)),
    formats.ErrorFeedback(formats.BlockInt(4), formats.BlockInt(8)),
  ]
  stored = [kinds[0], *(formats.encode_tree(x, f) for f in others)]
  assert len({type(s['w']) for s in stored}) == len(stored)
  assert len({states.kind(s['w']) for s in stored}) == len(stored)
