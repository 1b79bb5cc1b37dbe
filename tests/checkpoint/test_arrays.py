# SPDX-License-Identifier: Apache-2.0
"""States as flat dictionaries of NumPy arrays."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_mp import checkpoint
import states

NAMES = tuple(states.ROWS)


def test_plain_numpy(tmp_path):
  """Exact: through `numpy.savez`, read without pickle."""
  for name in NAMES:
    params, state = states.saved(name)
    np.savez(tmp_path / name, **checkpoint.to_arrays(state))
    with np.load(tmp_path / f'{name}.npz', allow_pickle=False) as arrays:
      assert_restored(states.tx_of(name), params, dict(arrays), state)


def test_safetensors(tmp_path):
  """Exact."""
  numpy = pytest.importorskip('safetensors.numpy')
  for name in NAMES:
    params, state = states.saved(name)
    numpy.save_file(checkpoint.to_arrays(state), tmp_path / name)
    arrays = numpy.load_file(tmp_path / name)
    assert_restored(states.tx_of(name), params, arrays, state)


def assert_restored(tx, params, arrays, state):
  restored = checkpoint.from_arrays(tx, params, arrays)
  chex.assert_trees_all_equal_structs(restored, state)
  chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
  states.assert_same_bits(restored, state)


@pytest.mark.parametrize('name', NAMES)
def test_arrays_are_numpys_own(name):
  """No array needs another package to be read."""
  arrays = checkpoint.to_arrays(states.saved(name))
  assert all(x.dtype.isbuiltin == 1 for x in arrays.values())
  assert all(type(x) is np.ndarray for x in arrays.values())


def anything(**leaves):
  """A transformation whose state is these arrays."""
  return optax.GradientTransformation(
    lambda params: dict(leaves), lambda u, s, p=None: (u, s)
  )


DTYPES = (
  'bool int4 uint4 int8 uint8 int16 uint16 int32 uint32 bfloat16 float16 '
  'float32 float8_e4m3fn float8_e5m2'
).split()


@pytest.mark.parametrize('shape', [(), (0,), (3,), (2, 3)], ids=str)
def test_dtypes_and_shapes(shape):
  """Exact: also for scalars and empty arrays."""
  numbers = jnp.arange(6).reshape(2, 3)
  if shape != (2, 3):
    numbers = numbers.ravel()[: np.prod(shape, dtype=int)].reshape(shape)
  tx = anything(**{name: numbers.astype(name) for name in DTYPES})
  arrays = checkpoint.to_arrays(tx.init(()))
  assert len(arrays) == len(DTYPES)
  assert_restored(tx, (), arrays, tx.init(()))


@pytest.mark.parametrize('impl', ['threefry2x32', 'rbg'])
def test_typed_keys(impl):
  """Exact: of either kind."""
  key = jax.random.key(7, impl=impl)
  tx = anything(key=key, keys=jax.random.split(key, 3))
  arrays = checkpoint.to_arrays(tx.init(()))
  restored = checkpoint.from_arrays(tx, (), arrays)
  assert restored['key'].dtype == key.dtype
  chex.assert_trees_all_equal(
    *(jax.tree.map(jax.random.key_data, x) for x in (restored, tx.init(())))
  )


def test_names():
  params, state = states.saved('4bit')
  del params
  arrays = checkpoint.to_arrays(state)
  name = 'inner_state/inner_state/0/mu/w/codes:int4'
  assert arrays[name].dtype == np.uint8
  assert 'residual/w/low__Split_8_v2' in arrays


def test_names_with_marks_of_their_own():
  """Exact: a colon in the name of a parameter is no dtype."""
  leaves = {
    'w:int4': jnp.ones(3),
    'v:': jnp.ones(3, jnp.bfloat16),
    ':': jnp.ones(2),
  }
  tx = anything(**leaves)
  assert_restored(tx, (), checkpoint.to_arrays(leaves), leaves)


def test_two_leaves_of_one_name():
  twice = {'a': {'b': jnp.zeros(2)}, 'a/b': jnp.zeros(2)}
  with pytest.raises(ValueError, match="same name.*'a/b'.*Rename"):
    checkpoint.to_arrays(twice)


def test_arrays_of_another_format():
  params, state = states.saved('8bit')
  arrays = checkpoint.to_arrays(state)
  with pytest.raises(ValueError, match='BlockInt_8_.*mu/w.*BlockInt_4_'):
    checkpoint.from_arrays(states.tx_of('4bit'), params, arrays)


def test_parameters_too():
  """Exact: what holds for states holds for trees of parameters."""
  params = states.tree(0, jnp.bfloat16)
  arrays = checkpoint.to_arrays(params)
  assert sorted(arrays) == ['b:bfloat16', 'w:bfloat16']
  tx = anything(**params)
  states.assert_same_bits(checkpoint.from_arrays(tx, (), arrays), params)


def test_a_state_that_was_trained_goes_on():
  """Exact: the next step is that of the run which was saved."""
  for name in ('4bit', 'coat'):
    tx, (params, state) = states.tx_of(name), states.saved(name)
    restored = checkpoint.from_arrays(tx, params, checkpoint.to_arrays(state))
    got = states.step_of(name)(params, restored)
    states.assert_same_bits(got, states.next_of(name))
