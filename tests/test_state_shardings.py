# SPDX-License-Identifier: Apache-2.0
"""`state_shardings` foretells where the arrays of a state lie."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import optax_mp
import tables

# Whole blocks remain on each device, or there are no blocks.
SHAPES = {
  'rows': ((64, 256), P('d', None)),
  'columns': ((16, 1024), P(None, 'd')),
  'odd': ((64, 200), P('d', None)),
  'stack': ((3, 64, 256), P(None, 'd', None)),
  'vector': ((1024,), P('d')),
  'whole': ((32, 128), P()),
}
ALL = {
  name: functools.partial(row.recipe, row.lr, min_size=0, **row.settings)
  for name, row in tables.RECIPES.items()
}
ALL |= {
  name: functools.partial(row.make, row.lr)
  for name, row in tables.PAPERS.items()
  if not row.variant
}


def make_mesh(kind=AxisType.Explicit):
  if jax.device_count() < 8:
    pytest.skip('needs 8 devices')
  return jax.make_mesh((8,), ('d',), axis_types=(kind,))


def shapes():
  return {
    name: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    for name, (shape, _) in SHAPES.items()
  }


def places(mesh):
  return {name: NamedSharding(mesh, spec) for name, (_, spec) in SHAPES.items()}


def placed(mesh):
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes(),
    places(mesh),
  )


def assert_equivalent(ours, theirs, state):
  structure = jax.tree.structure(state)
  assert jax.tree.structure(ours) == structure
  for (path, x), a, b in zip(
    jax.tree.leaves_with_path(state),
    jax.tree.leaves(ours),
    structure.flatten_up_to(theirs),
    strict=True,
  ):
    assert a.is_equivalent_to(b, x.ndim), (jax.tree_util.keystr(path), a, b)


@pytest.mark.parametrize('name', ALL)
def test_equals_the_types_of_explicit_axes(name):
  """kind: exact. Traced: on explicit axes JAX itself says it."""
  tx, mesh = ALL[name](), make_mesh()
  state = jax.eval_shape(tx.init, placed(mesh))
  foretold = optax_mp.state_shardings(tx, shapes(), places(mesh))

  def place(x):
    """A shape has an abstract mesh, and no sharding where nothing is cut."""
    return NamedSharding(mesh, x.sharding.spec if x.sharding else P())

  theirs = jax.tree.map(place, state)
  assert_equivalent(foretold, theirs, state)


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize('name', ['adamw_8bit', 'adamw_4bit_factored'])
def test_equals_what_the_compiler_chooses(name, kind, quickly):
  """kind: exact."""
  tx, mesh = ALL[name](), make_mesh(kind)
  compiled = jax.jit(tx.init).lower(placed(mesh)).compile()
  foretold = optax_mp.state_shardings(tx, shapes(), places(mesh))
  state = jax.eval_shape(tx.init, shapes())
  assert_equivalent(foretold, compiled.output_shardings, state)


@pytest.fixture(scope='module')
def trained():
  """A mesh, a transformation, where its state lies, that state."""
  tx, mesh = ALL['adamw_8bit'](), make_mesh(AxisType.Auto)
  params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes())
  params = jax.device_put(params, places(mesh))
  where = optax_mp.state_shardings(tx, params, places(mesh))
  state = jax.jit(tx.init, out_shardings=where)(params)
  return mesh, tx, where, state


def assert_lies(state, where):
  for x, place in zip(*map(jax.tree.leaves, (state, where)), strict=True):
    assert x.sharding.is_equivalent_to(place, x.ndim)


def test_serves_as_out_shardings(trained):
  _, _, where, state = trained
  assert_lies(state, where)


def test_serves_for_device_put(trained):
  """From a state on one device, as it comes from a file."""
  _, tx, where, state = trained
  host = jax.tree.map(np.asarray, state)
  moved = jax.device_put(host, where)
  assert_lies(moved, where)
  for x, y in zip(*map(jax.tree.leaves, (moved, host)), strict=True):
    np.testing.assert_array_equal(np.asarray(x), y)


def test_serves_as_an_abstract_target(trained, tmp_path):
  """Orbax restores each array to where it belongs."""
  ocp = pytest.importorskip('orbax.checkpoint')
  _, tx, where, state = trained
  target = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    jax.eval_shape(tx.init, shapes()),
    where,
  )
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'step', state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / 'step', target)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert_lies(restored, where)
  for x, y in zip(*map(jax.tree.leaves, (restored, state)), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit], ids=str)
def test_blocks_that_are_cut_are_whole(kind):
  """Scales that cannot be cut like the kernel are on every device."""
  mesh = make_mesh(kind)
  params = {'w': jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)}
  where = {'w': NamedSharding(mesh, P(None, 'd'))}
  tx = ALL['adamw_8bit']()
  foretold = optax_mp.state_shardings(tx, params, where)
  codes, scales = foretold.inner_state.inner_state[0].mu['w']
  assert codes.is_equivalent_to(where['w'], 2)
  assert scales.is_fully_replicated
  jax.jit(tx.init, out_shardings=foretold).lower(params)


@pytest.mark.parametrize('make', [optax.adamw, optax.adafactor, optax.sgd])
def test_optax_too(make):
  """A state without formats, with factors, without arrays."""
  tx, mesh = make(1e-3), make_mesh(AxisType.Auto)
  foretold = optax_mp.state_shardings(tx, shapes(), places(mesh))
  state = jax.eval_shape(tx.init, shapes())
  assert jax.tree.structure(foretold) == jax.tree.structure(state)
  jax.jit(tx.init, out_shardings=foretold).lower(shapes())


def test_one_sharding_for_all():
  mesh = make_mesh(AxisType.Auto)
  whole = NamedSharding(mesh, P())
  foretold = optax_mp.state_shardings(ALL['adamw_8bit'](), shapes(), whole)
  assert all(x.is_fully_replicated for x in jax.tree.leaves(foretold))


@pytest.mark.parametrize(
  ('shardings', 'message'),
  [({'w': 1}, '`shardings`'), ({'w': P('d')}, '`shardings`.*NamedSharding')],
)
def test_what_is_no_sharding_is_refused(shardings, message):
  params = {'w': jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)}
  with pytest.raises(ValueError, match=message):
    optax_mp.state_shardings(optax_mp.adamw_8bit(1e-3), params, shardings)


def test_several_meshes_are_refused():
  several = places(make_mesh()) | {'whole': places(make_half())['whole']}
  with pytest.raises(ValueError, match='`shardings` must be of one mesh'):
    optax_mp.state_shardings(optax_mp.adamw_8bit(1e-3), shapes(), several)


def make_half():
  return jax.make_mesh((4,), ('d',), devices=jax.devices()[:4])


def test_another_structure_is_refused():
  with pytest.raises(ValueError, match='`shardings`'):
    optax_mp.state_shardings(
      optax_mp.adamw_8bit(1e-3), shapes(), {'rows': places(make_mesh())['rows']}
    )
