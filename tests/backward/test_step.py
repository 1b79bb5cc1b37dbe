# SPDX-License-Identifier: Apache-2.0
"""The step in the backward pass is the ordinary step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import backward
from optax_mp import formats
from optax_mp import memory
import quick
import stacks
import tables

BF16 = jnp.bfloat16
STEPS = 50
CLOSE = {'rtol': 1e-6, 'atol': 1e-7}  # derived: 8 float32 ulps


def fused(tx, **options):
  return backward.fused_step(stacks.loss_fn, stacks.block_fn, tx, **options)


def train(step, model, steps=STEPS, jit=jax.jit, **call):
  """(rest, stack), state, losses."""
  step_fn = jit(lambda *args: step(*args, *model.batch, **call))
  rest, stack = model.rest, model.stack
  state, losses = step.init(rest, stack), []
  for _ in range(steps):
    rest, stack, state, loss = step_fn(rest, stack, state)
    losses.append(loss)
  return (rest, stack), state, np.stack(losses)


def train_ordinary(tx, model, steps=STEPS):
  step = jax.jit(stacks.ordinary(tx))
  params = (model.rest, model.stack)
  state, losses = tx.init(params), []
  for _ in range(steps):
    params, state, loss = step(params, state, *model.batch)
    losses.append(loss)
  return params, state, np.stack(losses)


def decayed(params):
  return jax.tree.map_with_path(lambda path, _: path[-1].key != 'bias', params)


def adamw():
  schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, STEPS)
  return optax.adamw(schedule, weight_decay=0.1, mask=decayed)


def exact_bf16():
  """Nothing in it is rounded stochastically."""
  moments = optax_mp.compressed(adamw(), formats.Split(8), min_size=0)
  return optax_mp.compensated(moments)


@pytest.mark.parametrize(
  'make, dtype',
  [
    (adamw, jnp.float32),
    (lambda: optax.sgd(0.1, momentum=0.9, nesterov=True), jnp.float32),
    (exact_bf16, BF16),
  ],
  ids=['adamw', 'sgd', 'compensated'],
)
def test_equals_the_ordinary_step(make, dtype):
  """Losses and parameters of 50 steps.

  kind: exact on the CPU, where both programs do the same operations; and, in
  case they are compiled differently one day, derived: 1e-6, 8 float32 ulps.
  """
  model = stacks.model(dtype)
  params, state, losses = train(fused(make()), model)
  expected, _, expected_losses = train_ordinary(make(), model)
  assert losses[-1] < 0.5 * losses[0]
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
  masters = optax_mp.checkpoint.to_float32
  if dtype == BF16:
    exact = masters(params[0], state.rest), masters(params[1], state.stack)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(exact))
  chex.assert_trees_all_close(params, expected, **CLOSE)
  if jax.default_backend() == 'cpu':
    chex.assert_trees_all_equal(params, expected)


NOISY = ('compressed-stochastic', 'compensated-0', 'adamw_8bit')
WRAPPED = {
  'compressed-stochastic': lambda: optax_mp.compressed(
    optax.adamw(1e-2), formats.BFloat16('stochastic'), min_size=0
  ),
  'compensated-0': lambda: optax_mp.compensated(adamw(), 0),
  'adamw_8bit': lambda: optax_mp.adamw_8bit(1e-2, min_size=0),
  'adafactor': tables.OPTIMIZERS['adafactor'],
  'lamb': tables.OPTIMIZERS['lamb'],
  'muon': tables.OPTIMIZERS['muon'],
  'partition': lambda: optax.partition(
    {True: optax.lion(1e-2), False: optax.sgd(1e-2)}, decayed
  ),
  'hyperparams': lambda: optax.inject_hyperparams(optax.adam)(1e-2),
}


@pytest.mark.parametrize('name', WRAPPED)
def test_any_transformation_that_treats_layers_alike(name):
  """What it is by `vmap` over layers, noise and state included.

  kind: derived: 1e-5, for Muon's products of products; but for one rounding in
  fifty, because an ulp may decide it. Of other noise, half of all would differ.
  """
  tx = WRAPPED[name]()
  model = stacks.model(BF16 if name in NOISY else jnp.float32)
  params, state, _ = train(fused(tx), model, steps=3, jit=quick.jit)
  init, step = stacks.by_layer(tx)
  step = quick.jit(step)
  expected = model.rest, model.stack
  expected_state = init(expected)
  for _ in range(3):
    expected, expected_state, _ = step(expected, expected_state, *model.batch)
  found = jax.tree.leaves((params, state.rest, state.stack))
  wanted = jax.tree.leaves((expected, *expected_state))
  pairs = zip(found, wanted, strict=True)
  same = [
    np.isclose(*(np.asarray(x, np.float64) for x in pair), 1e-5, 1e-7).ravel()
    for pair in pairs
  ]
  assert np.mean(np.concatenate(same)) >= (0.98 if name in NOISY else 1)


def test_layers_have_their_own_noise():
  """Equal layers with equal gradients: only the noise tells them apart.

  kind: statistical, 5 sigma: of two independent roundings half of those that
  are uncertain differ.
  """
  size = 4096
  stack, rest = {'w': jnp.ones((2, size), BF16)}, {'w': jnp.ones(size, BF16)}

  def loss_fn(rest, blocks):
    return jnp.sum(blocks(jnp.float32(0)) + rest['w'].astype(jnp.float32))

  def block_fn(p, h):
    return h + jnp.sum(p['w'].astype(jnp.float32))

  # A step by half of what separates 1 from the next smaller bfloat16.
  tx = optax_mp.compensated(optax.sgd(2.0**-9 / size), 0)
  step = backward.fused_step(loss_fn, block_fn, tx)
  scaled = quick.jit(lambda *args: step(*args))
  rest, stack, _, _ = scaled(rest, stack, step.init(rest, stack))
  down = [np.asarray(x < 1) for x in (*stack['w'],)]
  for each in down:
    assert abs(each.mean() - 0.5) < 5 * 0.5 / size**0.5
  both = np.mean(down[0] == down[1])
  assert abs(both - 0.5) < 5 * 0.5 / size**0.5


def test_a_stack_has_other_noise_than_another_and_than_the_rest():
  """Exact: of leaves of one path, no two are rounded alike."""
  size = 512
  half = 1 + 2.0**-9

  def block_fn(p, h):
    return h + jnp.sum(p['w'].astype(jnp.float32))

  def loss_fn(rest, blocks):
    h = blocks['b'](blocks['a'](jnp.float32(0)))
    return h + jnp.sum(rest['w'].astype(jnp.float32))

  tx = optax_mp.compensated(optax.sgd(half - 1), 0)
  step = backward.fused_step(loss_fn, {'a': block_fn, 'b': block_fn}, tx)
  ones = jnp.ones((2, size), BF16)
  rest, stack = {'w': ones[0]}, {'a': {'w': ones}, 'b': {'w': ones}}
  rest, stack, _, _ = quick.jit(step)(rest, stack, step.init(rest, stack))
  rows = [rest['w'], *stack['a']['w'], *stack['b']['w']]
  rows = np.stack([np.asarray(x, np.float32) for x in rows])
  assert len(np.unique(rows, axis=0)) == 5
  assert np.all(np.ptp(rows, axis=1) > 0)


def test_nothing_is_compiled_twice_and_types_stay():
  step = fused(exact_bf16(), max_norm=1.0, skip_nonfinite=True)
  model = stacks.model(BF16)
  chex.clear_trace_counter()
  step_fn = quick.jit(chex.assert_max_traces(lambda *x: step(*x), n=1))
  carry = (model.rest, model.stack, step.init(model.rest, model.stack))
  for _ in range(3):
    *new, _ = step_fn(*carry, *model.batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(tuple(new), carry)
    carry = tuple(new)


def test_under_scan_vmap_and_strict_promotion(strict):
  """kind: derived. Several steps in one program, of several members, no jit."""
  step, model = fused(optax.sgd(0.1, momentum=0.9)), stacks.model()
  state = step.init(model.rest, model.stack)

  def many(rest, stack, state):
    def body(carry, _):
      *carry, loss = step(*carry, *model.batch)
      return tuple(carry), loss

    return jax.lax.scan(body, (rest, stack, state), length=2)

  expected, _, losses = train(step, model, steps=2, jit=quick.jit)
  (*found, _), scanned = quick.jit(many)(model.rest, model.stack, state)
  chex.assert_trees_all_close(tuple(found), expected, **CLOSE)
  np.testing.assert_allclose(scanned, losses, rtol=1e-6)
  two = jax.tree.map(
    lambda x: jnp.stack([x, x]), (model.rest, model.stack, state)
  )
  (*found, _), _ = quick.jit(jax.vmap(many))(*two)
  second = jax.tree.map(lambda x: x[1], tuple(found))
  chex.assert_trees_all_close(second, expected, **CLOSE)
  rest, stack, _, _ = step(model.rest, model.stack, state, *model.batch)
  once, *_ = train(step, model, steps=1, jit=quick.jit)
  chex.assert_trees_all_close((rest, stack), once, **CLOSE)


def test_all_parameters_and_state_are_reused():
  """Exact: alias bytes are those of parameters and state."""
  model = stacks.model(BF16)
  step = fused(exact_bf16(), max_norm=1.0, skip_nonfinite=True)
  args = (model.rest, model.stack, step.init(model.rest, model.stack))
  size = sum(x.nbytes for x in jax.tree.leaves(args))
  compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*args, *model.batch)
  assert memory.report(compiled.compile()).alias_bytes == size


def test_the_plan_counts_no_gradients():
  """Exact: as the docstring says, 2 + 2 + 3 + 3 bytes and counts."""
  step, model = fused(exact_bf16()), stacks.model(BF16)
  whole = optax.GradientTransformation(
    lambda params: step.init(*params), lambda *_: None
  )
  params = (model.rest, model.stack)
  plan = memory.plan(whole, params, gradients=None)
  arrays = jax.tree.leaves((params, step.init(*params)))
  assert plan.total_bytes == sum(x.nbytes for x in arrays)
  fields = {row.field: row.bytes_per_param for row in plan.rows}
  assert {'params', 'residual', 'mu', 'nu'} <= set(fields)
  assert sum(fields[f] for f in ('params', 'residual')) == 4


def test_noise_of_optax_is_other_noise_in_each_layer():
  """Exact: no two of three layers and the rest get the same."""
  tx = optax.add_noise(1.0, 0.0, jax.random.key(0))
  stack, rest = {'w': jnp.zeros((3, 4))}, {'w': jnp.zeros(4)}

  def loss_fn(rest, blocks):
    return 0.0 * jnp.sum(blocks(rest['w']))

  step = backward.fused_step(loss_fn, lambda p, h: h + p['w'], tx)
  state = step.init(rest, stack)
  seen = []
  for _ in range(2):
    rest, stack, state, _ = quick.jit(step)(rest, stack, state)
    seen += [*np.asarray(stack['w']), np.asarray(rest['w'])]
  assert len(np.unique(np.round(seen, 5), axis=0)) == len(seen)
