# SPDX-License-Identifier: Apache-2.0
"""Every state restored as every other one: right, or refused by name.

Nothing may be read as garbage. A state is saved once by each library, and is
restored into what each transformation would have in a new process. Who refuses
may be the library, by the names of fields, or `update` while it is traced.
"""

import itertools
import pickle

import chex
import flax
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_mp import checkpoint
import states

ocp = pytest.importorskip('orbax.checkpoint')

NAMES = tuple(states.ROWS)
PAIRS = tuple(itertools.permutations(NAMES, 2))
LIBRARIES = ('orbax', 'nnx', 'flax', 'pickle')
# Float arrays of 16 and 32 bits mean their values: Orbax casts them.
CAST = {('bfloat16', 'float32'), ('float32', 'bfloat16')}
# Pickle restores what it saved: a map is kept with another `b1`, and parameters
# in float16 come with their own residuals.
KEPT = {'8bit', '8bit-b1', '8bit-float16'}


@pytest.fixture(scope='module')
def restore(tmp_path_factory):
  """``restore[library](saved name, name to restore as)``."""
  folder = tmp_path_factory.mktemp('states')
  with ocp.StandardCheckpointer() as checkpointer:
    for name in NAMES:
      checkpointer.save(folder / name, states.saved(name))
      checkpointer.save(folder / f'nnx-{name}', nnx_state(name))
    checkpointer.wait_until_finished()
    data = {
      name: flax.serialization.to_bytes(states.saved(name)) for name in NAMES
    }
    pickled = {name: pickle.dumps(states.saved(name)) for name in NAMES}
    yield {
      'orbax': lambda a, b: checkpointer.restore(
        folder / a, abstract(states.saved(b))
      ),
      'nnx': lambda a, b: from_nnx(
        b, checkpointer.restore(folder / f'nnx-{a}', abstract(nnx_state(b)))
      ),
      'flax': lambda a, b: flax.serialization.from_bytes(
        states.saved(b), data[a]
      ),
      'pickle': lambda a, b: pickle.loads(pickled[a]),
    }


class Model(nnx.Module):
  """The parameters of a state."""

  def __init__(self, params):
    self.w, self.b = nnx.Param(params['w']), nnx.Param(params['b'])


def nnx_state(name):
  """The same parameters and state, as Flax NNX keeps them."""
  params, state = states.saved(name)

  def init(variables):
    like = jax.eval_shape(states.tx_of(name).init, variables)
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(state))

  tx = optax.GradientTransformation(init, states.tx_of(name).update)
  model = Model(params)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  return nnx.state((model, optimizer.opt_state))


def from_nnx(name, restored):
  """Back to (params, state), in the containers of Optax."""
  variables, state = restored[0], restored[1]
  params = {key: variables[key].get_value() for key in variables}
  return params, checkpoint.rebuild(states.tx_of(name), params, state)


def abstract(tree):
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)

  return jax.tree.map(shape, tree)


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('name', NAMES)
def test_the_same_state_goes_on(restore, library, name):
  """Exact: the next step is that of the run which was saved."""
  restored = jax.tree.map(jnp.asarray, restore[library](name, name))
  chex.assert_trees_all_equal_structs(restored, states.saved(name))
  states.assert_same_bits(restored, states.saved(name))
  states.assert_same_bits(states.step_of(name)(*restored), states.next_of(name))


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('name', NAMES)
def test_other_states(restore, library, name):
  """Restored right or refused by name; none silent."""
  for other in NAMES:
    if other == name:
      continue
    try:
      restored = restore[library](name, other)
      jax.eval_shape(states.step_of(other), *restored)
    except (ValueError, KeyError, AttributeError) as error:
      assert not right(library, name, other)
      assert_names_both(error, library, name, other)
    else:
      assert right(library, name, other), f'{name} as {other}: silent'
      assert_cast(restored, states.saved(name))


def right(library, name, other):
  """Whether a state may be read as another one."""
  if library == 'pickle':
    return {name, other} <= KEPT
  return library in ('orbax', 'nnx') and (name, other) in CAST


def assert_cast(restored, saved):
  """kind: exact, or the nearest bfloat16 number, which a cast gives."""
  for x, y in zip(*map(jax.tree.leaves, (restored, saved)), strict=True):
    np.testing.assert_array_equal(x, y.astype(x.dtype))


def assert_names_both(error, library, name, other):
  """The message names a leaf, and how it is kept in either state."""
  text, told = str(error), isinstance(error, ValueError)
  if 'adamw' in (name, other):
    # Wrappers differ, or Optax and Flax look for fields that are not there.
    assert told or other == 'adamw'
    return
  if name in ('bfloat16', 'float32') and not told:
    # Flax looks for the fields of a NamedTuple in an array.
    assert "'numpy.ndarray' object has no attribute 'keys'" in text
    return
  old, new = states.kinds(states.saved(name)), states.kinds(states.saved(other))
  if library == 'pickle':  # which restores the parameters' dtype as well
    params, _ = states.saved(name)
    like = jax.eval_shape(states.tx_of(other).init, params)
    new = {f'1/{path}': kind for path, kind in states.kinds(like).items()}
    old = {path: old[path] for path in new}
  assert old.keys() == new.keys()
  found = [
    path
    for path in old
    if old[path] != new[path]
    and path.split('/')[-1] in text
    and said(old[path], text)
    and said(new[path], text)
  ]
  assert found, text


def said(kind, text):
  """A name, or the words for what has none.

  Orbax shows the classes of containers where one of the two has no fields.
  """
  nothing = ('set()', 'no bits', 'MISSING', 'NoResidual', 'ValueMetadataEntry')
  words = {
    'NoResidual': nothing,
    'bfloat16': ('bfloat16', 'ShapeDtypeStruct', 'ValueMetadataEntry'),
    'float32': ('float32', 'ShapeDtypeStruct', 'ValueMetadataEntry'),
  }
  return any(x in text for x in words.get(kind, (kind, "<class 'dict'>")))
