# SPDX-License-Identifier: Apache-2.0
"""What every optimizer of a paper keeps to, alone and inside the wrappers."""

import functools
import inspect
import re

import chex
from flax import nnx
from flax import serialization
from flax.training import train_state
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import backward
from optax_mp import checkpoint
from optax_mp import formats
from optax_mp import memory
import quick
import stacks
import tables
import test_contracts as contracts

BF16 = jnp.bfloat16
PAPERS = tables.PAPERS
TARGETS = contracts.WITHOUT_VALLEY
# Around them, and the dtype of the parameters.
AROUND = {
  'alone': lambda tx: tx,
  'compressed': lambda tx: optax_mp.compressed(
    tx, formats.BFloat16('stochastic'), min_size=0
  ),
  'both': tables.WRAPPERS['both'],
}
STATELESS = ('lomo',)  # nothing to compress
ALL = [
  (name, around)
  for name in PAPERS
  for around in AROUND
  if around == 'alone' or name not in STATELESS
]
MAIN = [name for name in PAPERS if not PAPERS[name].variant]


def make(name, around='alone', **others):
  row = PAPERS[name]
  return AROUND[around](row.make(**{'learning_rate': row.lr, **others}))


def injected(name, left_out='', **others):
  """With what decides on the program as `static_args`."""
  row = PAPERS[name]
  inject = optax.inject_hyperparams(
    row.make.func,
    static_args=[x for x in row.static if x != left_out],
    hyperparam_dtype=jnp.float32,
  )
  return inject(**{'learning_rate': row.lr, **row.make.keywords, **others})


# Traced only.


@pytest.mark.parametrize(('name', 'around'), ALL)
def test_shapes_and_dtypes_are_stable(name, around):
  """Through update, scan, cond and MultiSteps, with an unknown argument."""
  params = contracts.small_tree(BF16, jnp.float16, jnp.float32)
  tx = make(name, around)
  several = optax.MultiSteps(make(name, around), every_k_schedule=2)

  def body(carry, flip):
    step = contracts.step_fn(tx, unexpected=1)
    carry = jax.lax.cond(flip, lambda: step(*carry, params), lambda: carry)
    return carry, None

  def train(params, state, sums):
    carry = jax.lax.scan(body, (params, state), jnp.arange(3) % 2 == 0)[0]
    return carry, contracts.step_fn(several)(params, sums, params)[1]

  before = jax.eval_shape(tx.init, params), jax.eval_shape(several.init, params)
  (new_params, state), sums = jax.eval_shape(train, params, *before)
  chex.assert_trees_all_equal_shapes_and_dtypes(new_params, params)
  chex.assert_trees_all_equal_shapes_and_dtypes((state, sums), before)
  assert contracts.avals(state) == contracts.avals(before[0])


@pytest.mark.parametrize('shape', [(512, 256), (3, 64, 96), (384,)])
@pytest.mark.parametrize('name', PAPERS)
def test_bytes_are_as_documented(name, shape):
  """kind: exact. Beside what the row says: counts and keys."""
  row, params = PAPERS[name], {'kernel': jax.ShapeDtypeStruct(shape, BF16)}
  tx = make(name)
  small = 0
  for path, x in jax.tree.leaves_with_path(jax.eval_shape(tx.init, params)):
    is_count = x.ndim == 0 and x.dtype == jnp.int32
    if is_count or 'rng_key' in jax.tree_util.keystr(path):
      small += 4 * x.size
  wanted = row.bits(shape) if len(shape) > 1 else row.vector * shape[0]
  plan = memory.plan(tx, params, gradients=None)
  size = params['kernel'].size
  assert plan.total_bytes == 2 * size + wanted / 8 + small


@pytest.mark.parametrize('name', PAPERS)
def test_in_inject_hyperparams(name):
  """Traced: nothing asks for the value of a number."""
  tx = injected(name)
  params = {'kernel': jnp.ones((4, 3), BF16)}
  state = jax.eval_shape(tx.init, params)
  carry = jax.eval_shape(contracts.step_fn(tx), params, state, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(carry, (params, state))


def is_traced(value):
  """What `inject_hyperparams` calls as a schedule, or makes an array of."""
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return is_number or callable(value)


@pytest.mark.parametrize('name', PAPERS)
def test_says_what_must_be_static(name):
  """By the name of the argument."""
  row, params = PAPERS[name], {'kernel': jnp.ones((4, 3))}
  arguments = inspect.signature(row.make).parameters
  for argument in row.static:
    # Arrays make keys as well; Optax itself calls blocks(count), in vain.
    if argument not in ('blocks', 'seed'):
      if is_traced(arguments[argument].default):
        with pytest.raises(ValueError, match=f'`{argument}`.*`static_args`'):
          injected(name, argument).init(params)


@pytest.mark.parametrize('name', PAPERS)
def test_documents_what_must_be_static(name):
  row = PAPERS[name]
  doc = ' '.join(inspect.getdoc(row.make.func).split())
  (named,) = re.findall('``static_args`` are ([^.]*)[.]', doc)
  assert set(re.split(', | and ', named)) == set(row.static)


# Run.


@pytest.mark.parametrize(
  ('name', 'around'), [pair for pair in ALL if pair[1] != 'compressed']
)
def test_converges(name, around):
  """kind: claim, the one of Optax's own tests."""
  dtype = BF16 if around == 'both' else jnp.float32
  _, exact, _ = contracts.minimize(make(name, around), dtype, TARGETS)
  chex.assert_trees_all_close(
    exact, contracts.optimum_of(TARGETS), **contracts.CLAIM
  )


@pytest.mark.parametrize('name', PAPERS)
def test_schedule_equals_rates_that_are_set(name):
  """Of steps and of decay, whose rate is that of the same step.

  And every number does as a traced one what it does as a Python number.
  """
  rates = [0.5, 0.1, 0.3, 0.2]
  schedule = optax.piecewise_constant_schedule(0.5, {1: 0.2, 2: 3.0, 3: 2 / 3})
  params = params_at_start()
  wanted, _ = contracts.train(
    make(name, learning_rate=schedule, weight_decay=0.5), params
  )
  tx = injected(name, learning_rate=0.0, weight_decay=0.5)
  step, state = contracts.once(contracts.step_fn(tx)), tx.init(params)
  for i, rate in enumerate(rates):
    state.hyperparams['learning_rate'] = jnp.asarray(rate)
    params, state = step(params, state, contracts.gradients_of(params, i))
  # kind: derived. A decay in float32 is within 2^-25, of CAME's 1 - 0.9999 that
  # is 3e-4, and steps are one over a root of it.
  chex.assert_trees_all_close(params, wanted, rtol=3e-4, atol=1e-4)


# What the second gradient becomes, from the papers' words for it.
PLAIN = {
  'adam': lambda g, h: (
    ((0.09 * g + 0.1 * h) / 0.19)
    / (np.sqrt((0.999e-3 * g**2 + 1e-3 * h**2) / (1 - 0.999**2)))
  ),
  'rmsprop': lambda g, h: h / np.sqrt(0.999e-3 * g**2 + 1e-3 * h**2),
  'adagrad': lambda g, h: (0.09 * g + 0.1 * h) / np.sqrt(g**2 + h**2),
  'sgd': lambda g, h: 0.09 * g + 0.1 * h,
}


@pytest.mark.parametrize('name', PAPERS)
def test_mask_and_matrices(name):
  """What is masked does not decay, what is no matrix gets the plain form."""
  row, rate, decay = PAPERS[name], 0.1, 0.5
  names = 'kernel', 'masked', 'other', 'other_masked'
  rng = np.random.default_rng(0)

  def draw():
    sizes = rng.uniform(1, 2, (6, 4)), rng.choice([-1, 1], (6, 4))
    return np.float32(np.prod(sizes, axis=0))  # eps is nothing to them

  first, second = ({x: draw() for x in names} for _ in range(2))
  params = {x: np.sign(draw()) for x in names}  # of mean square 1, for AdaLomo
  settings = {'mask': lambda p: {x: 'masked' not in x for x in p}}
  if row.rest:
    settings['matrices'] = lambda p: {x: 'other' not in x for x in p}
  with_decay, bare = (
    make(name, learning_rate=rate, weight_decay=x, **settings)
    for x in (decay, 0.0)
  )

  def update(gradients, states):
    ours, state = with_decay.update(gradients, states[0], params)
    undecayed, other = bare.update(gradients, states[1], params)
    return (ours, undecayed), (state, other)

  step = quick.jit(update)
  _, states = step(first, (with_decay.init(params), bare.init(params)))
  (ours, undecayed), _ = step(second, states)
  for x, u in undecayed.items():
    rest = u if row.decays == 'after' else 0.0
    decayed = u - rate * decay * (params[x] + rest)
    wanted = u if 'masked' in x else decayed
    # kind: derived, a few roundings of float32.
    np.testing.assert_allclose(ours[x], wanted, rtol=0.0, atol=1e-6)
    if row.rest and 'other' in x:
      plain = -rate * PLAIN[row.rest](np.float64(first[x]), second[x])
      np.testing.assert_allclose(u, plain, rtol=1e-4)


def params_at_start(dtype=jnp.float32):
  return contracts.small_tree(dtype)


@pytest.mark.parametrize(
  'name', [name for name in MAIN if name not in STATELESS]
)
def test_every_leaf_moves_with_its_state_in_8_bits(name):
  """Whatever the fields are called; codes and keys are left alone."""
  tx = optax_mp.compressed(
    make(name), formats.BlockInt(8, rounding='stochastic'), min_size=0
  )
  params, _ = contracts.train(tx, params_at_start(), steps=2)
  chex.assert_tree_all_finite(params)
  for leaf, start in zip(
    jax.tree.leaves(params), jax.tree.leaves(params_at_start()), strict=True
  ):
    assert np.any(leaf != start)


@pytest.mark.parametrize('name', PAPERS)
def test_zeros_leave_weights_finite(name):
  """Also rows and columns of them beside gradients of 1e4."""
  tx = make(name)
  step = contracts.once(contracts.step_fn(tx))
  params = {
    'kernel': jnp.ones((5, 7)),
    'head': jnp.ones((3, 1)),
    'bias': jnp.ones((2,)),
    'scale': jnp.ones(()),
    'empty': jnp.ones((0, 4)),
  }
  carry = params, tx.init(params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  few = {x: g.at[..., :1].set(1e4) if g.ndim else g for x, g in zeros.items()}
  few['kernel'] = zeros['kernel'].at[0, :3].set(1e4)
  for gradients in (zeros, params, zeros, few, few):
    carry = step(*carry, gradients)
    chex.assert_tree_all_finite(carry)


@pytest.mark.parametrize('name', MAIN)
def test_apply_if_finite(name):
  """A gradient that is not finite leaves no trace."""
  tx = optax.apply_if_finite(make(name), 5)
  step = contracts.once(contracts.step_fn(tx))
  params = params_at_start()
  good = contracts.gradients_of(params)
  params, state = step(params, tx.init(params), good)
  bad = {**good, 'kernel': good['kernel'].at[0, 0].set(jnp.nan)}
  new_params, new_state = step(params, state, bad)
  contracts.assert_same_bits(new_params, params)
  contracts.assert_same_bits(new_state.inner_state, state.inner_state)


@pytest.mark.parametrize('name', MAIN)
def test_partition_mask_and_map_params(name):
  """Each group as if alone; an empty one is no error."""
  params = {'kernel': jnp.ones((4, 3)), 'norm': jnp.ones((3,))}
  tx = optax.partition(
    {'paper': make(name), 'plain': optax.sgd(0.1), 'none': make(name)},
    {'kernel': 'paper', 'norm': 'plain'},
  )
  gradients, state = contracts.gradients_of(params), tx.init(params)
  updates, new_state = quick.jit(tx.update)(gradients, state, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
  alone = {'kernel': params['kernel']}
  expected, _ = quick.jit(make(name).update)(
    {'kernel': gradients['kernel']}, make(name).init(alone), alone
  )
  # kind: derived, two programs.
  np.testing.assert_allclose(
    updates['kernel'], expected['kernel'], rtol=1e-5, atol=1e-7
  )
  state = make(name).init(params)
  mapped = optax.tree.map_params(make(name), lambda x: x, state)
  contracts.assert_same_bits(mapped, state)


@pytest.mark.parametrize('name', MAIN)
def test_flax(name):
  """TrainState, nnx.Optimizer, and its state through a state dict."""
  tx, params = make(name), {'kernel': jnp.ones((4, 3)), 'bias': jnp.ones((3,))}
  state = train_state.TrainState.create(
    apply_fn=lambda: None, params=params, tx=tx
  )
  stepped = quick.jit(lambda s: s.apply_gradients(grads=params))(state)
  saved = serialization.to_state_dict(stepped.opt_state)
  restored = serialization.from_state_dict(state.opt_state, saved)
  contracts.assert_same_bits(restored, stepped.opt_state)
  model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  graph, old = nnx.split((model, nnx.Optimizer(model, tx, wrt=nnx.Param)))

  def step(state):
    model, optimizer = nnx.merge(graph, state)
    loss = nnx.grad(lambda m: m(jnp.ones((2, 4))).sum())
    optimizer.update(model, loss(model))
    return nnx.state((model, optimizer))

  step = quick.jit(step)
  new = step(step(old))  # what comes back is a state, too
  assert np.any(new[0].kernel[...] != old[0].kernel[...])


@pytest.mark.parametrize('name', PAPERS)
def test_inside_the_backward_pass(name):
  """As a step of one layer at a time, weights exact in bfloat16 and 16 bits.

  kind: derived, two programs.
  """
  rest, stack, batch = stacks.model(BF16)
  tx = optax_mp.compensated(make(name))
  _, plain = stacks.by_layer(tx)
  fused = backward.fused_step(stacks.loss_fn, stacks.block_fn, tx)
  state = fused.init(rest, stack)
  other = state.rest, state.stack  # a key for each layer
  params, step, plain = (rest, stack), quick.jit(fused), quick.jit(plain)
  for _ in range(3):
    rest, stack, state, loss = step(rest, stack, state, *batch)
    params, other, expected = plain(params, other, *batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-3)
  for ours, theirs, own, others in (
    (rest, params[0], state.rest, other[0]),
    (stack, params[1], state.stack, other[1]),
  ):
    chex.assert_trees_all_close(
      checkpoint.to_float32(ours, own),
      checkpoint.to_float32(theirs, others),
      rtol=1e-3,
      atol=1e-4,
    )


@pytest.mark.parametrize('name', PAPERS)
def test_eight_devices_equal_one(name, mesh):
  """kind: derived, sums in another order."""
  rng = np.random.default_rng(0)
  shapes = {'rows': (16, 6), 'columns': (6, 16), 'layers': (3, 16, 8)}
  specs = {'rows': P('d'), 'columns': P(None, 'd'), 'layers': P(None, 'd')}
  host = [
    {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    for _ in range(3)
  ]

  def put(tree):
    return {
      k: jax.device_put(x, NamedSharding(mesh, specs[k]))
      for k, x in tree.items()
    }

  def trained(place):
    tx = make(name)
    params, *gradients = map(place, host)
    state, step = tx.init(params), quick.jit(contracts.step_fn(tx))
    for g in gradients:
      params, state = step(params, state, g)
    for key, g in gradients[0].items():
      assert params[key].sharding.is_equivalent_to(g.sharding, g.ndim)
    return jax.tree.map(np.asarray, params)

  # In its own mesh: in one of eight devices, JAX 0.9 copies to all of them.
  single = jax.make_mesh((1,), ('d',), axis_types=mesh.axis_types)
  with jax.set_mesh(single):
    one = trained(functools.partial(jax.tree.map, jnp.asarray))
  chex.assert_trees_all_close(trained(put), one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', PAPERS)
def test_vmap_over_layers(name):
  tx, params = make(name), {'kernel': jnp.ones((4, 3))}
  layers = jax.tree.map(lambda p: jnp.stack([p, 2 * p, 3 * p]), params)
  stacked = jax.vmap(tx.init)(layers)
  updates, new = jax.eval_shape(jax.vmap(tx.update), layers, stacked, layers)
  chex.assert_trees_all_equal_shapes_and_dtypes(new, stacked)
  chex.assert_trees_all_equal_shapes(updates, layers)
