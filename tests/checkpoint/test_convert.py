# SPDX-License-Identifier: Apache-2.0
"""From every recipe to every other one, and from plain Optax and back."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import checkpoint
from optax_mp import formats
import states
import tables

BF16 = jnp.bfloat16
NAMES = tuple(states.ROWS)
OURS = tuple(name for name in NAMES if name != 'adamw')
# The relative error of a weight that is cut to so many bits, to nearest.
CUT = {16: 0.0, 8: 2.0**-16, 0: 2.0**-8}
CUT16 = {16: 0.0, 8: 2.0**-19, 0: 2.0**-11}  # of float16: three bits more


def convert(old, new, params, state, **kwargs):
  return checkpoint.convert(
    states.tx_of(old), states.tx_of(new), state, params, **kwargs
  )


def weights(params, state):
  """The float32 weights that are trained."""
  try:
    return checkpoint.to_float32(params, state)
  except ValueError:  # nothing compensates them
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def residual_bits(state):
  residual = getattr(state, 'residual', None)
  arrays = jax.tree.leaves(residual)
  return 8 * arrays[0].dtype.itemsize if arrays else 0


def moments(name, params, state):
  adam = checkpoint.to_optax(states.tx_of(name), state, params)[0]
  return {'mu': adam.mu, 'nu': adam.nu}


def one_code(values, size=128, **kwargs):
  """One bin of a map, which stochastic rounding may move through."""

  def scale(x, bad, last):
    del bad, last  # all are numbers here
    groups = tables.grouped(x, size)
    wide = np.broadcast_to(groups.max(-1, keepdims=True), groups.shape)
    return wide.reshape(x.shape)

  return tables.scaled(values, **({'share': 1.0, 'scale': scale} | kwargs))


def relative(bound):
  return lambda x: bound * np.abs(x)


SQRT = tables.codes('sqrt', 127)
BITS = tables.logarithmic(255, 1.0)
# How far moments move when they are stored, each in its format.
MU = {
  '8bit': one_code(tables.codes('sqrt_log', 127)),
  '8bit-0': one_code(tables.codes('sqrt_log', 127)),
  '8bit-float16': one_code(tables.codes('sqrt_log', 127)),
  '8bit-b1': one_code(SQRT),
  '4bit': one_code(tables.codes('softsign', 7)),
  'factored': one_code(tables.codes('softsign', 7)),
  'coat': tables.expanded(tables.E4M3),
  'flash': one_code(tables.codes('softsign', 127), 32),
  'bf16-16': relative(2.0**-15),
  'bf16-8': relative(2.0**-15),
  'bf16-0': relative(2.0**-15),
  'feedback': tables.feedback(
    one_code(SQRT, share=0.5), tables.codes('sqrt', 7)
  ),
  'softsign': one_code(tables.codes('softsign', 127), share=0.5),
  'block64': one_code(SQRT, 64, share=0.5),
  'rank1': one_code(SQRT, share=0.5, scale=tables.smaller_units),
  'bfloat16': relative(2.0**-8),
  'float32': relative(0.0),
  'adamw': relative(0.0),
}
NU = dict.fromkeys(MU, BITS) | {
  '4bit': tables.logarithmic(15, 1.0),
  'factored': tables.factored,
  'coat': tables.expanded(tables.E4M3, 1.0),
  'flash': one_code(tables.codes('sqrt', 255), 32, whole=[0]),
  'bf16-16': relative(2.0**-15),
  'bf16-8': relative(2.0**-15),
  'bf16-0': relative(2.0**-15),
  'feedback': relative(2.0**-16),
  'adamw': relative(0.0),
}


@pytest.mark.parametrize('old', NAMES)
def test_between_every_two(old):
  """Derived: weights to half a unit of the new width, moments to one code."""
  params, state = states.saved(old)
  masters, averages = weights(params, state), moments(old, params, state)
  for new in NAMES:
    dtype = states.ROWS[new].dtype
    new_params, new_state = convert(old, new, params, state, dtype=dtype)
    like = jax.eval_shape(states.tx_of(new).init, new_params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, like)
    assert_same_weights(weights(new_params, new_state), masters, new, new_state)
    got = moments(new, new_params, new_state)
    for field, bounds in (('mu', MU), ('nu', NU)):
      assert_same_moments(got[field], averages[field], bounds[new])


def assert_same_moments(got, expected, bound):
  """kind: derived, a code of the new format; small leaves are exact."""
  np.testing.assert_array_equal(got['b'], expected['b'])
  x = np.asarray(expected['w'])
  # Products with scales are rounded to float32.
  assert np.all(np.abs(got['w'] - x) <= bound(x) + 2.0**-16 * np.abs(x))


def assert_same_weights(got, expected, name, state):
  """kind: exact with 16 residual bits, else half a unit of the last place."""
  dtype = states.ROWS[name].dtype
  table = CUT16 if dtype == jnp.float16 else CUT
  rel = 0.0 if dtype == jnp.float32 else table[residual_bits(state)]
  # float16 has no more than 2^-24 / 2^bits below its smallest normal number.
  least = 2.0**-25 if dtype == jnp.float16 else 0.0
  for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
    assert np.all(np.abs(x - y) <= rel * np.abs(y) + least)


@pytest.mark.parametrize('name', OURS)
def test_to_the_same_recipe_is_exact(name):
  """Exact: every code, residual and count; so is the step that follows."""
  params, state = states.saved(name)
  again = checkpoint.convert(
    states.tx_of(name), states.ROWS[name].make(), state, params
  )
  chex.assert_trees_all_equal_structs(again, (params, state))
  states.assert_same_bits(again, (params, state))


def test_there_and_back():
  """Exact: 24 bits of a moment hold what a bfloat16 number is."""
  params, state = states.saved('bfloat16')
  there = convert('bfloat16', 'bf16-8', params, state)
  back = convert('bf16-8', 'bfloat16', *there)
  states.assert_same_bits(back[0], params)
  was, now = (x.inner_state.inner_state[0].mu for x in (state, back[1]))
  states.assert_same_bits(now, was)


@pytest.mark.parametrize(
  ('old', 'new', 'exact'),
  [('bf16-16', 'bf16-8', False), ('bf16-8', 'bf16-16', True)],
)
def test_residual_bits(old, new, exact):
  """Exact where bits are added; derived, 2^-16 of a weight, where cut."""
  params, state = states.saved(old)
  expected = weights(params, state)
  got = weights(*convert(old, new, params, state))
  for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
    assert np.all(np.abs(x - y) <= (0.0 if exact else 2.0**-16) * np.abs(y))


def test_residuals_that_would_be_lost():
  params, state = states.saved('8bit')
  with pytest.raises(
    ValueError, match="no residual for 'b'.*dtype=jnp.float32"
  ):
    convert('8bit', 'adamw', params, state)
  new_params, _ = convert('8bit', 'adamw', params, state, dtype=jnp.float32)
  chex.assert_trees_all_equal(new_params, weights(params, state))
  # Without residuals nothing is lost.
  params, state = states.saved('bf16-0')
  new_params, _ = convert('bf16-0', 'adamw', params, state)
  states.assert_same_bits(new_params, params)


def test_parameters_that_nothing_would_compensate():
  params, state = states.saved('adamw')
  with pytest.raises(
    ValueError, match="bfloat16 at 'b'.*`new_tx`.*compensated"
  ):
    convert('adamw', 'adamw', params, state, dtype=BF16)


def test_optax_in_bfloat16():
  """Exact: parameters and moments that nothing compensated so far."""
  tx, params = optax.adamw(1e-2), states.tree(0, BF16)
  params, state = states.apply(tx, params, tx.init(params))
  new_params, new_state = checkpoint.convert(
    tx, states.tx_of('bf16-16'), state, params
  )
  states.assert_same_bits(new_params, params)
  like = states.tx_of('bf16-16').init(params)
  chex.assert_trees_all_equal_shapes_and_dtypes(new_state, like)
  chex.assert_trees_all_equal(new_state.residual, like.residual)
  adam = checkpoint.to_optax(states.tx_of('bf16-16'), new_state, params)[0]
  for got, x in ((adam.mu, state[0].mu), (adam.nu, state[0].nu)):
    chex.assert_trees_all_equal(got, optax.tree.cast(x, jnp.float32))


@pytest.mark.parametrize('name', ['8bit', 'bf16-16'])
def test_a_run_that_switches_and_returns(name):
  """Claim: it ends where float32 ends, within 2 % of the way it went.

  Ten steps of plain Optax in float32, ten of a recipe in bfloat16, and ten of
  Optax again.
  """
  tx = states.tx_of('adamw')
  start = states.tree(0, jnp.float32)
  run = run_of('adamw')
  expected, _ = run(start, tx.init(start), 0, 30)
  params, state = run(start, tx.init(start), 0, 10)
  params, state = convert('adamw', name, params, state, dtype=BF16)
  params, state = run_of(name)(params, state, 10, 20)
  params, state = convert(name, 'adamw', params, state, dtype=jnp.float32)
  params, state = run(params, state, 20, 30)
  assert state[0].count == 30
  way = optax.tree.norm(optax.tree.sub(expected, start))
  apart = optax.tree.norm(optax.tree.sub(expected, params))
  assert apart <= 0.02 * way


def run_of(name):
  """Steps `first` to `last`, with the gradients of those numbers."""
  step = states.quick.jit(
    lambda params, state, gradients: states.moved(
      states.tx_of(name), params, state, gradients
    )
  )

  def run(params, state, first, last):
    for i in range(first, last):
      params, state = step(params, state, states.tree(i + 1, BF16))
    return params, state

  return run


WRAPPED = {
  'chain': lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
  'partition': lambda tx: optax.partition(
    {'w': tx, 'b': tx}, {'w': 'w', 'b': 'b'}
  ),
  'some-plain': lambda tx: optax.partition(
    {'w': tx, 'b': optax.set_to_zero()}, {'w': 'w', 'b': 'b'}
  ),
  'multi-steps': lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
  'masked': lambda tx: optax.masked(tx, {'w': True, 'b': True}),
}


@pytest.mark.parametrize('wrap', WRAPPED)
def test_inside_optax_wrappers(wrap):
  """Exact: what is around the recipe stays; what is in it is converted."""
  wide, old, new = (
    WRAPPED[wrap](tx)
    for tx in (
      states.tx_of('adamw'),
      optax_mp.adamw_bf16(1e-2),
      states.tx_of('8bit'),
    )
  )
  params = states.tree(0, BF16)
  params, state = states.apply(old, params, old.init(params))
  there = checkpoint.convert(old, new, state, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(there[1], new.init(params))
  jax.eval_shape(new.update, params, there[1], there[0])
  back = checkpoint.convert(new, old, there[1], there[0])
  jax.eval_shape(old.update, params, back[1], back[0])
  expected = params
  if wrap != 'some-plain':
    states.assert_same_values(weights(*there), weights(params, state), 2.0**-16)
    dtype = jnp.float32
    expected, plain = checkpoint.convert(old, wide, state, params, dtype)
    chex.assert_trees_all_equal_shapes_and_dtypes(plain, wide.init(expected))


def test_inside_inject_hyperparams():
  """Exact: the hyperparameters of the old state go on."""
  static = {*optax_mp.adamw_8bit.static_args, *optax_mp.adamw_4bit.static_args}
  old, new = (
    optax.inject_hyperparams(recipe, static, hyperparam_dtype=jnp.float32)(1e-2)
    for recipe in (optax_mp.adamw_8bit, optax_mp.adamw_4bit)
  )
  params = states.tree(0, BF16)
  state = old.init(params)
  state.hyperparams['learning_rate'] = jnp.float32(3e-3)
  _, there = checkpoint.convert(old, new, state, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(there, new.init(params))
  assert there.hyperparams['learning_rate'] == jnp.float32(3e-3)


@pytest.mark.parametrize('bits', [16, 8, 0])
def test_papers(bits):
  """Exact: what a paper's optimizer keeps in vectors stays in float32."""
  plain = optax_mp.came(1e-2)
  old = optax_mp.compensated(plain, bits)
  new = optax_mp.compensated(
    optax_mp.compressed(plain, {'mu': formats.BlockInt(8)}), 8
  )
  params = states.tree(0, BF16)
  params, state = states.apply(old, params, old.init(params))
  new_params, new_state = checkpoint.convert(old, new, state, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(new_state, new.init(params))
  was, now = (
    checkpoint.to_optax(*x)
    for x in ((old, state, params), (new, new_state, new_params))
  )
  chex.assert_trees_all_equal_structs(was, now)
  changed = [
    jax.tree_util.keystr(path)
    for path, same in jax.tree_util.tree_leaves_with_path(
      jax.tree.map(lambda x, y: bool(jnp.all(x == y)), was, now)
    )
    if not same
  ]
  assert changed == ["[0].mu['w']"]


def test_a_paper_with_a_format_of_its_own():
  """Exact: what MicroAdam keeps in four bits itself goes on as it is."""
  old, new = (
    optax_mp.compensated(optax_mp.micro_adam(1e-2), bits) for bits in (16, 8)
  )
  params = states.tree(0, BF16)
  params, state = states.apply(old, params, old.init(params))
  new_params, new_state = checkpoint.convert(old, new, state, params)
  states.assert_same_bits(new_state.inner_state, state.inner_state)
  chex.assert_trees_all_equal_structs(new_state, new.init(new_params))
