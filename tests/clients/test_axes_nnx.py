# SPDX-License-Identifier: Apache-2.0
"""NNX Variables with shardings: what has another shape has its own axes."""

import functools

import chex
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
import optax
from orbax import checkpoint as ocp
import pytest

from clients import named

KINDS = [AxisType.Auto, AxisType.Explicit]


class Model(nnx.Module):
  """A bag of parameters, each with a sharding or all without."""

  def __init__(self, names=named.FEW, sharded=True):
    for name, value in named.values(0, names).items():
      axes = {'out_sharding': named.SHAPES[name][1]} if sharded else {}
      setattr(self, name, nnx.Param(jnp.asarray(value), **axes))


def make(tx, names=named.FEW, sharded=True):
  model = Model(names, sharded)
  return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def step(model, optimizer, gradients):
  """As if they came from a loss: with the parameters' Variables."""
  state = nnx.state(model, nnx.Param)
  boxes = {name: state[name].replace(g) for name, g in gradients.items()}
  optimizer.update(model, nnx.State(boxes))


@pytest.fixture(params=KINDS, ids=str)
def mesh(request):
  mesh = named.make_mesh(request.param)
  with jax.set_mesh(mesh):
    yield mesh


@pytest.mark.parametrize('name', named.ALL)
def test_optimizer_is_made_and_updates(name, mesh):
  """Traced: Flax constrains every array of the state where it is made."""
  tx = named.ALL[name]()

  def run():
    model, optimizer = make(tx, named.SHAPES)
    before = nnx.state((model, optimizer))
    if mesh.axis_types[0] == AxisType.Explicit:
      step(model, optimizer, named.values(1))
    return before, nnx.state((model, optimizer))

  before, after = nnx.eval_shape(run)
  chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
  # On explicit axes a loop asks for the same type after each step.
  for x, y in zip(*map(jax.tree.leaves, (before, after)), strict=True):
    assert x.sharding == y.sharding


@functools.cache
def on_one_device(name):
  """Parameters after two steps, without shardings."""
  model, optimizer = make(named.ALL[name](), sharded=False)
  jitted = nnx.jit(step)
  for seed in (1, 2):
    jitted(model, optimizer, named.values(seed, named.FEW))
  return jax.device_get(nnx.to_pure_dict(nnx.state(model)))


@nnx.jit(static_argnums=0)
def create(tx):
  """As Flax's guide has it: made in pieces, each where its names say."""
  pair = make(tx)
  state = nnx.state(pair)
  specs = nnx.get_partition_spec(state)
  nnx.update(pair, jax.lax.with_sharding_constraint(state, specs))
  return pair


def assert_lies_well(model, optimizer):
  """What has a parameter's shape lies like it, nothing is cut in vain."""
  places = {
    n: x.sharding for n, x in nnx.to_pure_dict(nnx.state(model)).items()
  }
  found = 0
  for path, x in jax.tree.leaves_with_path(
    nnx.to_pure_dict(nnx.state(optimizer))
  ):
    for name, place in places.items():
      if any(getattr(k, 'key', None) == name for k in path):
        if x.shape == named.SHAPES[name][0]:
          assert x.sharding.is_equivalent_to(place, x.ndim), path
          found += 1
  assert found >= 2 * len(places)  # a moment and a residual


@pytest.mark.parametrize('name', named.SOME)
def test_eight_devices_equal_one(name, mesh):
  """After two steps: the parameters."""
  model, optimizer = create(named.ALL[name]())
  assert_lies_well(model, optimizer)
  jitted = nnx.jit(step)
  for seed in (1, 2):
    jitted(model, optimizer, named.values(seed, named.FEW))
  got = nnx.to_pure_dict(nnx.state(model))
  named.assert_close(got, on_one_device(name))


@pytest.mark.parametrize('name', ['optax.adamw', *named.SOME[:2]])
def test_restores_where_it_lay(name, mesh, tmp_path):
  """kind: exact. Orbax, into the abstract state with its own shardings."""
  tx = optax.adamw(1e-3) if name == 'optax.adamw' else named.ALL[name]()
  pair = create(tx)
  nnx.jit(step)(*pair, named.values(1, named.FEW))
  state = nnx.state(pair)
  specs = nnx.get_partition_spec(nnx.eval_shape(lambda: nnx.state(make(tx))))
  target = jax.tree.map(
    lambda x, spec: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
    ),
    state,
    specs,
  )
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'step', state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / 'step', target)
  chex.assert_trees_all_equal(named.widened(restored), named.widened(state))
  for x, y in zip(*map(jax.tree.leaves, (restored, target)), strict=True):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


@pytest.mark.parametrize('name', named.SOME)
def test_state_goes_where_its_specs_say(name, mesh):
  """`device_put` of a state that was made without a mesh."""
  pair = make(named.ALL[name](), sharded=False)
  specs = nnx.get_partition_spec(
    nnx.eval_shape(lambda: nnx.state(make(named.ALL[name]())))
  )
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
  places = nnx.to_pure_dict(shardings)
  nnx.update(pair, jax.device_put(nnx.to_pure_dict(nnx.state(pair)), places))
  assert_lies_well(*pair)
