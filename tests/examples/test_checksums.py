# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with a flipped bit is refused, or restores the same arrays."""

import gc
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checksums
import optax_mp
import small_gpt
import train_gpt

POSITIONS = 16  # of each file


def _state(seed=0):
  """Bfloat16, uint8, int8, uint32 and float32; vectors and scalars."""
  keys = jax.random.split(jax.random.key(seed), 2)
  params = {
    'kernel': jax.random.normal(keys[0], (64, 128), jnp.bfloat16),
    'bias': jax.random.normal(keys[1], (7,), jnp.bfloat16),
  }
  tx = optax_mp.adamw_8bit(1e-3)
  _, opt_state = tx.update(params, tx.init(params), params)
  return train_gpt.State(params, opt_state)


def _built(state):
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
  )
  return train_gpt.Setup(lambda: state, shapes, None, None, {}, None)


def _checkpoints(tmp_path):
  return train_gpt.Checkpoints(small_gpt.config(checkpoint=str(tmp_path)))


def _bits(tree):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def _files(folder):
  return sorted(path for path in folder.rglob('*') if path.is_file())


@pytest.fixture
def unfinished(monkeypatch):
  """Orbax leaves coroutines behind when it finds the damage itself."""
  monkeypatch.setattr(sys, 'unraisablehook', lambda _: None)
  yield
  gc.collect()


@pytest.mark.filterwarnings('ignore:coroutine.*never awaited:RuntimeWarning')
@pytest.mark.usefixtures('unfinished')
def test_no_flipped_bit_passes(tmp_path):
  """Exact: the same arrays, or a ValueError, wherever the bit is."""
  state = _state()
  _checkpoints(tmp_path).save(state, 3)
  reasons = []
  for path in _files(tmp_path / '3'):
    whole = path.read_bytes()
    places = np.linspace(0, len(whole) - 1, POSITIONS, dtype=int)
    for bit, place in enumerate(places):
      damaged = bytearray(whole)
      damaged[place] ^= 1 << bit % 8
      path.write_bytes(damaged)
      try:
        restored = _checkpoints(tmp_path).restore(_built(state))
      except ValueError as error:
        reasons.append(str(error))
      else:
        assert _bits(restored) == _bits((state, 3)), (path, place, bit % 8)
    path.write_bytes(whole)
  restored = _checkpoints(tmp_path).restore(_built(state))
  assert _bits(restored) == _bits((state, 3))
  # Orbax alone lets these through.
  assert sum(' was saved' in reason for reason in reasons) > POSITIONS
  assert all('Move this folder away' in reason for reason in reasons)


def _flip_a_bit_of_the_arrays(folder):
  """Finds a bit that Orbax does not look after."""
  *_, path = sorted(_files(folder), key=lambda path: path.stat().st_size)
  whole = bytearray(path.read_bytes())
  whole[len(whole) // 2] ^= 1
  path.write_bytes(whole)


def test_the_way_out_is_the_step_before(tmp_path):
  states = {step: _state(step) for step in (1, 2)}
  built = _built(states[1])
  for step, state in states.items():
    _checkpoints(tmp_path).save(state, step)
  _flip_a_bit_of_the_arrays(tmp_path / '2')
  message = r"/2 is damaged.*\['state'\]\.\w.* goes on from step 1"
  with pytest.raises(ValueError, match=message):
    _checkpoints(tmp_path).restore(built)
  shutil.move(tmp_path / '2', tmp_path / 'damaged')
  restored = _checkpoints(tmp_path).restore(built)
  assert _bits(restored) == _bits((states[1], 1))


def test_without_a_step_before_it_starts_anew(tmp_path):
  state = _state()
  _checkpoints(tmp_path).save(state, 1)
  shutil.rmtree(tmp_path / '1' / 'checksums')
  with pytest.raises(ValueError, match='goes on from the beginning'):
    _checkpoints(tmp_path).restore(_built(state))
  shutil.rmtree(tmp_path / '1')
  assert _checkpoints(tmp_path).restore(_built(state)) == (state, 0)


DTYPES = [
  'bool',
  'int4',
  'uint8',
  'int32',
  'float8_e4m3fn',
  'float16',
  'bfloat16',
  'float32',
]


@pytest.mark.parametrize('shape', [(), (0,), (5,), (3, 4)], ids=str)
@pytest.mark.parametrize('dtype', DTYPES)
def test_every_value_counts(dtype, shape):
  """Exact: a change of any one value, of the shape or of the dtype."""
  ones = np.ones(shape, dtype)
  sums = checksums.of({'a': jnp.asarray(ones)})
  assert sums == checksums.of({'a': ones})
  checksums.verify({'a': ones}, sums)
  others = [ones[None]]
  others += [ones.view('int8')] if dtype != 'bool' and shape else []
  for place in range(ones.size):
    others.append(ones.copy())
    others[-1].reshape(-1)[place] = 0
  for other in others:
    with pytest.raises(ValueError, match=r"\['a'\] is .* was saved"):
      checksums.verify({'a': other}, sums)


def test_leaves_that_come_and_go():
  sums = checksums.of({'a': jnp.ones(2), 'b': 1})
  with pytest.raises(ValueError, match=r"\['b'\] is missing, but int64\[\]"):
    checksums.verify({'a': jnp.ones(2)}, sums)
  with pytest.raises(ValueError, match=r"\['c'\].* but nothing was saved"):
    checksums.verify({'a': jnp.ones(2), 'b': 1, 'c': 1}, sums)
