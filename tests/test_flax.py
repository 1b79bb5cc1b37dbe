# SPDX-License-Identifier: Apache-2.0
"""Flax around a transformation: Linen, NNX, serialization and checkpoints."""

import pickle

import chex
import flax
from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import checkpoint
from optax_mp import formats

BF16 = jnp.bfloat16
INPUTS = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
TARGETS = INPUTS[:, :3] ** 2


def kernels_only(path, leaf):
  """A rule on paths: the biases' moments stay float32."""
  del leaf
  return formats.Split(8) if 'kernel' in path.split('/') else None


def by_path():
  inner = optax.adamw(1e-2, weight_decay=0.1)
  small = optax_mp.compressed(inner, kernels_only, min_size=0)
  return optax_mp.compensated(small, residual_bits=8)


def recipe():
  return optax_mp.adamw_bf16(1e-2, weight_decay=0.1, min_size=0)


def eight_bits():
  """Blocks, and float32 where the path says so."""
  return optax_mp.adamw_8bit(
    1e-2, weight_decay=0.1, min_size=0, keep_float32='bias'
  )


def four_bits():
  """int4 arrays."""
  return optax_mp.adamw_4bit(1e-2, min_size=0)


TRANSFORMATIONS = {
  'recipe': recipe,
  'by-path': by_path,
  'eight-bits': eight_bits,
  'four-bits': four_bits,
}


class LinenMLP(flax.linen.Module):
  """Two layers with bfloat16 parameters."""

  @flax.linen.compact
  def __call__(self, x):
    x = flax.linen.Dense(8, param_dtype=BF16, name='hidden')(x)
    return flax.linen.Dense(3, param_dtype=BF16, name='head')(jnp.tanh(x))


class NNXMLP(nnx.Module):
  """The same in NNX."""

  def __init__(self, rngs):
    self.hidden = nnx.Linear(6, 8, param_dtype=BF16, rngs=rngs)
    self.head = nnx.Linear(8, 3, param_dtype=BF16, rngs=rngs)

  def __call__(self, x):
    return self.head(jnp.tanh(self.hidden(x)))


def error(outputs):
  return jnp.mean((outputs.astype(jnp.float32) - TARGETS) ** 2)


@jax.jit
def loss_and_gradients(params):
  return jax.value_and_grad(
    lambda params: error(LinenMLP().apply({'params': params}, INPUTS))
  )(params)


def linen_params():
  return LinenMLP().init(jax.random.key(0), INPUTS)['params']


def assert_same_bits(*trees):
  """kind: exact. As integers: -0.0 is not 0.0."""

  def view(x):
    x = np.asarray(x)
    return x.view(f'u{x.itemsize}')

  chex.assert_trees_all_equal(*(jax.tree.map(view, tree) for tree in trees))


def plain_loop(tx, params, state, steps):
  """Optax alone, operation by operation."""
  for _ in range(steps):
    _, gradients = loss_and_gradients(params)
    updates, state = tx.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


@pytest.mark.parametrize('name', TRANSFORMATIONS)
def test_train_state(name):
  """Linen's TrainState is the plain loop."""
  tx, params = TRANSFORMATIONS[name](), linen_params()
  state = train_state.TrainState.create(
    apply_fn=LinenMLP().apply, params=params, tx=tx
  )
  for _ in range(3):
    _, gradients = loss_and_gradients(state.params)
    state = state.apply_gradients(grads=gradients)
  expected = plain_loop(tx, params, tx.init(params), 3)
  assert_same_bits((state.params, state.opt_state), expected)


def test_train_state_under_jit():
  """It trains, its dtypes stay, and it is traced once."""
  state = start = train_state.TrainState.create(
    apply_fn=LinenMLP().apply, params=linen_params(), tx=recipe()
  )

  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(state):
    loss, gradients = loss_and_gradients(state.params)
    return state.apply_gradients(grads=gradients), loss

  state = state.replace(step=jnp.asarray(state.step))
  losses = []
  for _ in range(50):
    state, loss = step(state)
    losses.append(float(loss))
  chex.assert_trees_all_equal_shapes_and_dtypes(
    (state.params, state.opt_state), (start.params, start.opt_state)
  )
  assert losses[-1] < losses[0] / 2  # kind: claim, it learns


@pytest.mark.parametrize('name', TRANSFORMATIONS)
def test_nnx_optimizer(name):
  """NNX's Optimizer is the plain loop on its state of parameters."""
  tx, model = TRANSFORMATIONS[name](), NNXMLP(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  params = nnx.state(model, nnx.Param)
  state = tx.init(params)
  grad = nnx.jit(nnx.grad(lambda model: error(model(INPUTS))))
  for _ in range(3):
    gradients = grad(model)
    updates, state = tx.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    optimizer.update(model, gradients)
    assert_same_bits(leaves(nnx.state(model, nnx.Param)), leaves(params))
  assert_same_bits(by_name(nnx.state(optimizer.opt_state)), by_name(state))
  assert {x.dtype for x in leaves(params)} == {jnp.dtype(BF16)}


def leaves(tree):
  return jax.tree.leaves(tree)


def by_name(tree):
  """Leaves by path, without the attribute that NNX adds, which also sorts."""
  named = {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  return {name.replace('/value', ''): leaf for name, leaf in named.items()}


def test_nnx_optimizer_under_jit():
  """It trains, and the rule on paths finds the kernels of the module."""
  model = NNXMLP(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, by_path(), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    loss, gradients = nnx.value_and_grad(lambda m: error(m(INPUTS)))(model)
    optimizer.update(model, gradients)
    return loss

  losses = [float(step(model, optimizer)) for _ in range(50)]
  assert losses[-1] < losses[0] / 2  # kind: claim, it learns
  dtypes = [x.dtype for x in leaves(nnx.state(optimizer.opt_state))]
  # Two kernels in two moments are high and low; two biases in two are not.
  assert dtypes.count(BF16) == 4 and dtypes.count(jnp.float32) == 4


@pytest.fixture(scope='module', params=TRANSFORMATIONS)
def trained(request):
  """(tx, {params, state} after two steps, the same after four)."""
  tx, params = TRANSFORMATIONS[request.param](), linen_params()
  now = plain_loop(tx, params, tx.init(params), 2)
  return tx, now, plain_loop(tx, *now, 2)


def fresh(tx):
  """What a new process has before it restores."""
  params = jax.tree.map(jnp.zeros_like, linen_params())
  return params, tx.init(params)


def test_flax_serialization(trained):
  tx, now, later = trained
  data = flax.serialization.to_bytes(now)
  restored = flax.serialization.from_bytes(fresh(tx), data)
  chex.assert_trees_all_equal_structs(restored, now)
  assert_same_bits(restored, now)
  restored = jax.tree.map(jnp.asarray, restored)
  assert_same_bits(plain_loop(tx, *restored, 2), later)


def test_pickle(trained):
  _, now, _ = trained
  restored = pickle.loads(pickle.dumps(now))
  chex.assert_trees_all_equal_structs(restored, now)
  assert_same_bits(restored, now)


def test_orbax(trained, tmp_path):
  ocp = pytest.importorskip('orbax.checkpoint')
  tx, now, later = trained
  params, state = now
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'step', {'params': params, 'state': state})
    checkpointer.wait_until_finished()
    params, state = fresh(tx)
    target = jax.tree.map(
      ocp.utils.to_shape_dtype_struct, {'params': params, 'state': state}
    )
    restored = checkpointer.restore(tmp_path / 'step', target)
  restored = restored['params'], restored['state']
  chex.assert_trees_all_equal_structs(restored, now)
  assert_same_bits(restored, now)
  assert_same_bits(plain_loop(tx, *restored, 2), later)
  exact = checkpoint.to_float32(*restored)
  assert_same_bits(exact, checkpoint.to_float32(*now))


def test_nnx_optimizer_gives_its_float32_weights():
  """Exact: residuals are found in the optimizer's own containers."""
  model = NNXMLP(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, by_path(), wrt=nnx.Param)
  gradients = nnx.grad(lambda m: error(m(INPUTS)))(model)
  optimizer.update(model, gradients)
  params = nnx.state(model, nnx.Param)
  got = checkpoint.to_float32(params, optimizer.opt_state)
  residuals = leaves(optimizer.opt_state.residual)
  for x, param, residual in zip(
    leaves(got), leaves(params), residuals, strict=True
  ):
    stored = formats.HighLow(param, residual)
    assert_same_bits(x, formats.Split(8).decode(stored, x))


@pytest.mark.parametrize(
  'wrap',
  [
    lambda tx: optax.MultiSteps(tx, 2),
    lambda tx: optax.chain(
      optax.stateless(lambda g, p: optax.tree.cast(g, jnp.float32)),
      optax.apply_if_finite(tx, 5),
    ),
  ],
)
def test_nnx_optimizer_around_what_merges_states(wrap):
  """Flax keeps NamedTuples as mappings; they must come out as they went in."""
  model = NNXMLP(nnx.Rngs(0))
  tx = wrap(optax_mp.adamw_bf16(1e-2, min_size=0))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  before = [np.asarray(x, np.float32) for x in leaves(nnx.state(model))]
  for _ in range(4):
    gradients = nnx.grad(lambda m: error(m(INPUTS)))(model)
    optimizer.update(model, gradients)
  after = [np.asarray(x, np.float32) for x in leaves(nnx.state(model))]
  assert all((x != y).any() for x, y in zip(before, after, strict=True))
