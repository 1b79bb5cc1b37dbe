# SPDX-License-Identifier: Apache-2.0
"""Linen's boxes: what has another shape has its own logical axes."""

import functools

import flax.linen as nn
from flax.training import train_state
import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from orbax import checkpoint as ocp
import pytest

from clients import linen_lm
from clients import named

RULES = (('few', 'b'), ('many', 'd'))
LOGICAL = {'b': 'few', 'd': 'many', None: None}


class Model(nn.Module):
  """A bag of parameters with logical axes."""

  names: tuple[str, ...] = named.FEW

  @nn.compact
  def __call__(self):
    for name, value in named.values(0, self.names).items():
      axes = [LOGICAL[axis] for axis in named.SHAPES[name][1]]
      init = linen_lm.named(lambda key, x: jax.numpy.asarray(x), *axes)
      self.param(name, init, value)


def create(tx, names=named.FEW):
  params = Model(names).init(jax.random.key(0))['params']
  return train_state.TrainState.create(apply_fn=None, params=params, tx=tx)


def shardings_of(init, mesh):
  """As Flax's guide has it: from the boxes of the abstract state."""
  specs = nn.get_partition_spec(jax.eval_shape(init))
  return nn.logical_to_mesh_sharding(specs, mesh, RULES)


def update(state, gradients):
  """Gradients are in boxes like the parameters."""
  boxes = jax.tree.map(
    lambda box, g: box.replace_boxed(g),
    state.params,
    gradients,
    is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata),
  )
  return state.apply_gradients(grads=boxes)


@pytest.mark.parametrize('name', named.ALL)
def test_shardings_fit_the_state(name):
  """Traced and lowered: every array can be cut as its box says."""
  mesh = named.make_mesh()
  init = functools.partial(create, named.ALL[name](), named.SHAPES)
  shardings = shardings_of(init, mesh)
  jax.jit(init, out_shardings=shardings).lower()
  state = nn.meta.unbox(jax.eval_shape(init))
  wanted = {
    key: NamedSharding(mesh, jax.P(*axes))
    for key, (_, axes) in named.SHAPES.items()
  }
  found = 0
  for (path, x), place in zip(
    jax.tree.leaves_with_path(state.opt_state),
    jax.tree.leaves(shardings.opt_state),
    strict=True,
  ):
    keys = {getattr(k, 'key', None) for k in path} & wanted.keys()
    for key in keys:
      if x.shape == named.SHAPES[key][0]:
        assert place.is_equivalent_to(wanted[key], x.ndim), path
        found += 1
  assert found >= len(wanted)  # residuals, and momenta of most


@pytest.mark.parametrize('name', named.ALL)
def test_steps_on_explicit_axes(name):
  """Traced: boxes are made before anything is known to be cut."""
  mesh = named.make_mesh(AxisType.Explicit)
  init = functools.partial(create, named.ALL[name](), named.SHAPES)
  abstract, gradients = jax.eval_shape(init), named.values(1)
  shardings = shardings_of(init, mesh)
  place = functools.partial(jax.tree.map, with_sharding)
  with jax.set_mesh(mesh):
    state = place(nn.meta.unbox(abstract), linen_lm.unbox(shardings))
    after = jax.eval_shape(
      lambda state, g: state.apply_gradients(grads=g), state, gradients
    )
  shapes = [
    jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, after)
  ]
  assert shapes[0] == shapes[1]


def with_sharding(x, place):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


@functools.cache
def on_one_device(name):
  """Parameters after two steps."""
  state = create(named.ALL[name]())
  step = jax.jit(update)
  for seed in (1, 2):
    state = step(state, named.values(seed, named.FEW))
  return jax.device_get(nn.meta.unbox(state.params))


@pytest.mark.parametrize('boxes', [True, False], ids=['boxes', 'unboxed'])
@pytest.mark.parametrize('name', named.SOME)
def test_eight_devices_equal_one(name, boxes):
  """After two steps, in boxes or, as in lm1b, after they are taken off."""
  mesh = named.make_mesh()
  init = functools.partial(create, named.ALL[name]())
  shardings = shardings_of(init, mesh)
  state = jax.jit(init, out_shardings=shardings)()
  if boxes:
    step = jax.jit(update, out_shardings=shardings, donate_argnums=0)
  else:
    state = linen_lm.unbox(state)
    step = jax.jit(
      lambda state, g: state.apply_gradients(grads=g),
      out_shardings=linen_lm.unbox(shardings),
      donate_argnums=0,
    )
  for seed in (1, 2):
    state = step(state, named.values(seed, named.FEW))
  named.assert_close(nn.meta.unbox(state.params), on_one_device(name))


@pytest.mark.parametrize('name', named.SOME[:2])
def test_restores_where_it_lay(name, tmp_path):
  """kind: exact. Orbax, into the abstract state with its own shardings."""
  mesh = named.make_mesh()
  init = functools.partial(create, named.ALL[name]())
  shardings = shardings_of(init, mesh)
  state = jax.jit(init, out_shardings=shardings)()
  target = jax.tree.map(
    lambda place, box: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), box
    ),
    shardings,
    jax.eval_shape(init),
  )
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'step', state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / 'step', target)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  for x, y in zip(*map(jax.tree.leaves, (restored, state)), strict=True):
    assert (named.widened(x) == named.widened(y)).all()
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
