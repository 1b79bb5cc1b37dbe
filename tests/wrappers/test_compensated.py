# SPDX-License-Identifier: Apache-2.0
"""`compensated`: bfloat16 parameters that train like float32 ones."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import checkpoint
from optax_mp import formats

STEPS = 100
SHAPES = {'kernel': (8, 12), 'bias': (12,), 'scale': ()}


def _mask(params):
  return jax.tree.map(lambda p: p.ndim > 1, params)


def _schedule(peak):
  return optax.warmup_cosine_decay_schedule(0.0, peak, 10, STEPS, peak / 50)


EXACT = {
  'adamw-schedule-mask': optax.adamw(
    _schedule(1e-2), weight_decay=0.1, mask=_mask
  ),
  'clip-adamw': optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(3e-3, weight_decay=0.1)
  ),
  'sgd-nesterov-decay': optax.chain(
    optax.add_decayed_weights(1e-2, mask=_mask),
    optax.sgd(_schedule(0.1), momentum=0.9, nesterov=True),
  ),
  'lion': optax.lion(_schedule(1e-3), weight_decay=0.1, mask=_mask),
  'adafactor': optax.adafactor(
    1e-2, min_dim_size_to_factor=4, weight_decay_rate=1e-3
  ),
  'lamb': optax.lamb(_schedule(1e-2), weight_decay=0.1),
  'nadamw': optax.nadamw(1e-2, weight_decay=0.1),
  'adan': optax.adan(1e-2, weight_decay=0.02),
  'amsgrad': optax.amsgrad(_schedule(1e-2)),
  'rmsprop-momentum': optax.rmsprop(1e-3, momentum=0.9),
  'masked-adam': optax.chain(
    optax.clip(0.5), optax.masked(optax.adam(1e-2), _mask), optax.scale(0.5)
  ),
}


def _tree(seed, scale=1.0, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  return {
    name: jnp.asarray(rng.normal(size=shape) * scale, dtype)
    for name, shape in SHAPES.items()
  }


def _float32(tree):
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


@functools.partial(jax.jit, static_argnums=0)
def _jitted(tx, grads, state, params):
  updates, state = tx.update(grads, state, params)
  return optax.apply_updates(params, updates), state


def _eager(tx, grads, state, params):
  updates, state = tx.update(grads, state, params)
  return optax.apply_updates(params, updates), state


@pytest.mark.parametrize(
  'name, grad_dtype',
  [(name, jnp.float32) for name in EXACT] + [('clip-adamw', jnp.bfloat16)],
)
def test_bit_identical_to_float32_operation_by_operation(name, grad_dtype):
  """Exact: the master is the float32 run's weight after every step."""
  inner = EXACT[name]
  tx = optax_mp.compensated(inner)
  # Steps are as large as the weights: many cross zero, some shrink a lot.
  params = _tree(0, 0.02, jnp.bfloat16)
  params32 = _float32(params)
  state, state32 = tx.init(params), inner.init(params32)
  for step in range(STEPS):
    grads = _tree(step + 1, dtype=grad_dtype)
    params, state = _eager(tx, grads, state, params)
    params32, state32 = _eager(inner, _float32(grads), state32, params32)
    chex.assert_trees_all_equal(checkpoint.to_float32(params, state), params32)
    chex.assert_trees_all_equal(state.inner_state, state32)


@pytest.mark.parametrize('name', ['adamw-schedule-mask', 'lion', 'adan'])
def test_a_few_ulps_from_float32_under_jit(name):
  """Derived: two programs may fuse, and so contract a*b+c, differently.

  One step moves a weight w by u = inner(...), a chain of fewer than 16
  operations, each within 2^-24 of its result in either program; the gradients
  are given, so errors of the steps add up and do not feed back but through
  weight decay, which shrinks them.
  """
  inner, epsilon = EXACT[name], 2.0**-24
  tx = optax_mp.compensated(inner)
  params = _tree(0, 0.02, jnp.bfloat16)
  params32 = _float32(params)
  state, state32 = tx.init(params), inner.init(params32)
  bound = jax.tree.map(jnp.zeros_like, params32)
  for step in range(STEPS):
    grads, old = _tree(step + 1), params32
    params, state = _jitted(tx, grads, state, params)
    params32, state32 = _jitted(inner, grads, state32, params32)
    bound = jax.tree.map(
      lambda b, w, v: b + 16 * epsilon * (abs(w) + abs(v - w)),
      bound,
      old,
      params32,
    )
  master = checkpoint.to_float32(params, state)
  for key, limit in bound.items():
    assert np.all(np.abs(master[key] - params32[key]) <= limit), key


def test_eight_bits_stay_near_one_step_of_float32():
  """Derived: 24 bits have 16 significant ones; stochastic, so one whole place.

  A place is 2^-15 of the binade's lower end, and the weight is no smaller.
  """
  inner = optax.adamw(1e-3, weight_decay=0.1)
  tx = optax_mp.compensated(inner, 8)
  params, state = checkpoint.from_float32(tx, _tree(0, 0.02))
  for step in range(20):
    grads, master = _tree(step + 1), checkpoint.to_float32(params, state)
    updates, _ = inner.update(grads, state.inner_state, master)
    expected = optax.apply_updates(master, updates)
    params, state = _eager(tx, grads, state, params)
    got = checkpoint.to_float32(params, state)
    for key, want in expected.items():
      assert np.all(np.abs(got[key] - want) <= 2.0**-15 * np.abs(want)), key


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('bits', [8, 0])
def test_stochastic_rounding_is_unbiased(bits, dtype):
  """Statistical: the mean of many draws is the float32 step, 5 sigma."""
  draws = 20_000
  params = jnp.array([1.0, -1.0, 0.3, 1e-3, 0.01], dtype)
  grads = jnp.array([1.0, 0.7, -0.013, 0.1, 0.2])
  tx = optax_mp.compensated(optax.sgd(1.3e-4), bits)
  state = tx.init(params)

  def draw(count):
    updates, new = tx.update(grads, state._replace(noise_count=count), params)
    return checkpoint.to_float32(optax.apply_updates(params, updates), new)

  counts = jnp.arange(draws, dtype=jnp.uint32)
  got = np.asarray(jax.vmap(draw)(counts), np.float64)
  want = np.asarray(params, np.float64) - 1.3e-4 * np.asarray(grads)
  # The float32 step itself is within one place of its exact value.
  floor = 2.0**-23 * np.abs(want)
  sigma = got.std(0) / np.sqrt(draws)
  assert np.all(np.abs(got.mean(0) - want) <= 5 * sigma + floor)
  assert np.all(got.std(0) > 0)


@pytest.mark.parametrize('lr', [1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize('bits', [16, 8])
def test_apply_updates_lands_on_the_stored_weight(lr, bits):
  """Exact: weights of usual size, steps up to as large as they are."""
  rng = np.random.default_rng(0)
  params = jnp.asarray(rng.normal(size=2**18) * 0.02, jnp.bfloat16)
  grads = jnp.asarray(rng.normal(size=2**18), jnp.float32)
  tx = optax_mp.compensated(optax.sgd(lr), bits)
  new, state = _jitted(tx, grads, tx.init(params), params)
  want = np.asarray(params, np.float32) - np.float32(lr) * np.asarray(grads)
  got = np.asarray(checkpoint.to_float32(new, state))
  place = 2.0**-23 if bits == 16 else 2.0**-15
  # Contraction moves the weight by a float32 place of the larger operand.
  slack = 2.0**-23 * np.maximum(np.abs(want), np.abs(params.astype(float)))
  far = np.abs(got - want) > place * np.abs(want) + slack
  shrunk = 65536 * np.abs(want) < np.abs(np.asarray(params, np.float32))
  assert not np.any(far & ~shrunk)
  assert shrunk.mean() <= 2.0**-14  # so rare that the test says something


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('bits', [16, 8])
def test_a_weight_that_nearly_vanishes(bits, dtype):
  """Derived: exact down to a share of the old weight, then to its rounding.

  p' - p fits into float32 while p' is not 2^16 (float16: 2^13) times smaller;
  beyond it p + (p' - p) is off by half a place of p, 2^-24 of it, and so is
  what the residual is added to, whose own reach is still less.
  """
  ratio = 2.0 ** -np.arange(8.0, 30.0, 0.25)
  old = np.full(2 * ratio.size, 1.5, np.float32)
  want = np.concatenate([ratio, -ratio]).astype(np.float32) * 1.2345678
  tx = optax_mp.compensated(optax.sgd(1.0), bits)
  params = jnp.asarray(old, dtype)
  grads = jnp.asarray(old - want)
  want = old - np.asarray(grads)  # what float32 has of it
  new, state = _jitted(tx, grads, tx.init(params), params)
  got = np.asarray(checkpoint.to_float32(new, state))
  reach = 2.0 ** (16 if dtype == jnp.bfloat16 else 13)
  bound = 2.0**-23 * old * (reach * np.abs(want) < old)
  bound += 2.0**-15 * np.abs(want) if bits == 8 else 0
  # float16 has subnormals below 6.1e-5, whose residuals have fixed places.
  bound += 2.0**-40 if dtype == jnp.float16 else 0
  bound += 2.0**-31 if dtype == jnp.float16 and bits == 8 else 0
  assert np.all(np.abs(got - want) <= bound)


@pytest.mark.parametrize('bits', [16, 8])
def test_a_weight_set_to_zero_is_zero(bits):
  """A user may prune weights between steps; old residuals are then tiny."""
  tx = optax_mp.compensated(optax.sgd(1e-3), bits)
  params = jnp.asarray(np.linspace(-1, 1, 1000), jnp.bfloat16)
  params, state = _eager(tx, jnp.ones(1000), tx.init(params), params)
  master = checkpoint.to_float32(jnp.zeros_like(params), state)
  assert np.all(np.abs(master) < 2.0**-126)  # below the smallest normal


def test_negative_zero_stays():
  tx = optax_mp.compensated(optax.sgd(1.0))
  params = jnp.array([-0.0], jnp.bfloat16)
  new, _ = _eager(tx, jnp.zeros(1), tx.init(params), params)
  assert np.signbit(np.asarray(new, np.float32))


def test_float16_is_exact_in_its_normal_range():
  """Exact: weights between 6.1e-5 and 65504 keep every float32 bit."""
  inner = optax.adamw(_schedule(1e-3), weight_decay=0.1)
  tx = optax_mp.compensated(inner)
  params = jax.tree.map(
    lambda x: (jnp.sign(x) + x).astype(jnp.float16), _tree(0, 0.1)
  )
  params32 = _float32(params)
  state, state32 = tx.init(params), inner.init(params32)
  for step in range(STEPS):
    grads = _tree(step + 1)
    params, state = _eager(tx, grads, state, params)
    params32, state32 = _eager(inner, grads, state32, params32)
  assert all(jnp.all(abs(x) > 6.2e-5) for x in jax.tree.leaves(params32))
  chex.assert_trees_all_equal(checkpoint.to_float32(params, state), params32)


def test_float32_leaves_pass_through_untouched():
  inner = optax.adamw(1e-2, weight_decay=0.1)
  tx = optax_mp.compensated(inner)
  params = {'half': jnp.ones(4, jnp.bfloat16), 'full': jnp.full(4, 0.1)}
  state, state32 = tx.init(params), inner.init(_float32(params))
  grads = jax.tree.map(jnp.ones_like, params)
  updates, state = tx.update(grads, state, params)
  expected, _ = inner.update(_float32(grads), state32, _float32(params))
  chex.assert_trees_all_equal(updates['full'], expected['full'])
  assert state.residual['full'] == optax.EmptyState()
  assert state.residual['half'].low.dtype == jnp.uint16


@pytest.mark.parametrize(
  'dtype, bits, expected',
  [
    (jnp.bfloat16, 16, jnp.uint16),
    (jnp.bfloat16, 8, jnp.uint8),
    (jnp.float16, 16, jnp.int16),
    (jnp.float16, 8, jnp.int8),
  ],
)
def test_residual_has_the_promised_bits(dtype, bits, expected):
  params = jnp.ones((3, 5), dtype)
  state = optax_mp.compensated(optax.sgd(0.1), bits).init(params)
  chex.assert_shape(state.residual.low, (3, 5))
  assert state.residual.low.dtype == expected
  assert (
    jax.tree.leaves(
      optax_mp.compensated(optax.sgd(0.1), 0).init(params).residual
    )
    == []
  )


@pytest.mark.parametrize('bits', [4, 32, 16.0, '16', True, None])
def test_wrong_residual_bits(bits):
  with pytest.raises(ValueError, match='`residual_bits` must be one of'):
    optax_mp.compensated(optax.sgd(0.1), bits)


@pytest.mark.parametrize('seed', [0.5, -1, 2**32, True, None])
def test_wrong_seed(seed):
  with pytest.raises(ValueError, match='`seed` must be an integer from 0 to'):
    optax_mp.compensated(optax.sgd(0.1), seed=seed)


@pytest.mark.parametrize('inner', [optax.sgd, 1e-3, None])
def test_no_inner_transformation(inner):
  with pytest.raises(ValueError, match='`inner` must be an Optax'):
    optax_mp.compensated(inner)
  with pytest.raises(ValueError, match='`inner` must be an Optax'):
    optax_mp.compressed(inner, formats.Split(8))


def test_numpy_integers_are_integers():
  tx = optax_mp.compensated(
    optax.sgd(0.1), np.int64(8), seed=np.uint32(2**32 - 1)
  )
  state = tx.init(jnp.ones(3, jnp.bfloat16))
  assert state.residual.low.dtype == jnp.uint8


def test_the_state_of_something_else():
  tx = optax_mp.compensated(optax.sgd(0.1))
  params = jnp.ones(3, jnp.bfloat16)
  with pytest.raises(ValueError, match='`state` must be the CompensatedState'):
    tx.update(params, tx.init(params).inner_state, params)


def test_gradients_of_another_shape():
  tx = optax_mp.compensated(optax.sgd(0.1))
  params = jnp.ones(3, jnp.bfloat16)
  with pytest.raises(ValueError, match=r'`updates` has the shape \(4, 3\)'):
    tx.update(jnp.ones((4, 3)), tx.init(params), params)


def test_the_same_under_x64_with_wide_updates():
  """Exact: float64 updates are added as `optax.apply_updates` adds them."""
  with jax.enable_x64(True):
    inner = optax.stateless(lambda g, p: g.astype(jnp.float64) * -0.0123)
    tx = optax_mp.compensated(inner)
    params = jnp.asarray(np.linspace(-1, 1, 1000), jnp.bfloat16)
    params32 = params.astype(jnp.float32)
    state = tx.init(params)
    for step in range(5):
      grads = jnp.sin(step + params32)
      params, state = _eager(tx, grads, state, params)
      params32, _ = _eager(inner, grads, inner.init(params32), params32)
    master = checkpoint.to_float32(params, state)
    chex.assert_trees_all_equal(master, params32)


def test_gradients_of_integers():
  """`jax.grad(..., allow_int=True)` gives float0, which Optax's masks skip."""
  mask = {'w': True, 'i': False}
  params = {'w': jnp.ones((8, 8), jnp.bfloat16), 'i': jnp.arange(3)}

  def loss(params):
    return jnp.sum(params['w'].astype(jnp.float32))

  grads = jax.grad(loss, allow_int=True)(params)
  inner = optax.masked(optax.adam(0.1), mask)
  for tx in (
    optax_mp.compensated(inner),
    optax_mp.compressed(inner, formats.Split(8), min_size=0),
  ):
    updates, _ = tx.update(grads, tx.init(params), params)
    assert jnp.all(updates['w'] < 0)
    assert updates['i'].dtype == jax.dtypes.float0


def test_groups_of_a_partition_get_different_noise():
  """Also where both groups have the same seed and state."""
  groups = {k: optax_mp.compensated(optax.sgd(1.0), 0) for k in 'xy'}
  tx = optax.partition(groups, {'a': 'x', 'b': 'y'})
  params = {k: jnp.ones(1000, jnp.bfloat16) for k in 'ab'}
  grads = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3), params)
  new, _ = _jitted(tx, grads, tx.init(params), params)
  correlation = np.corrcoef(new['a'] == 1, new['b'] == 1)[0, 1]
  assert abs(correlation) < 5 / np.sqrt(1000)


def test_state_and_parameter_get_different_noise():
  rule = formats.BFloat16('stochastic')
  small = optax_mp.compressed(optax.trace(0.9), rule, min_size=0)
  tx = optax_mp.compensated(small, 0)
  params, grads = jnp.ones(1000, jnp.bfloat16), jnp.full(1000, 1.001)
  new, state = _jitted(tx, grads, tx.init(params), params)
  trace = state.inner_state.inner_state.trace
  correlation = np.corrcoef(new > 2, trace > 1)[0, 1]
  assert abs(correlation) < 5 / np.sqrt(1000)


def test_missing_params():
  tx = optax_mp.compensated(optax.sgd(0.1))
  params = jnp.ones(3, jnp.bfloat16)
  with pytest.raises(ValueError, match='`params` is None.*Call `update'):
    tx.update(params, tx.init(params))


@pytest.mark.parametrize('wrong', [jnp.float32, jnp.float16])
def test_dtype_changed_since_init(wrong):
  tx = optax_mp.compensated(optax.sgd(0.1))
  params = {'w': jnp.ones(3, jnp.bfloat16)}
  state = tx.init(params)
  other = {'w': params['w'].astype(wrong)}
  with pytest.raises(
    ValueError, match=r"at 'w', which needs.*Call `init` again"
  ):
    jax.jit(tx.update)(other, state, other)


def test_shape_or_structure_changed_since_init():
  tx = optax_mp.compensated(optax.sgd(0.1))
  params = {'w': jnp.ones(3, jnp.bfloat16)}
  state = tx.init(params)
  longer = {'w': jnp.ones(4, jnp.bfloat16)}
  with pytest.raises(ValueError, match=r'bfloat16\(4,\)'):
    tx.update(longer, state, longer)
  more = {**params, 'v': params['w']}
  with pytest.raises(ValueError, match='`state` does not have the structure'):
    tx.update(more, state, more)
  with pytest.raises(ValueError, match='`updates` does not have the structure'):
    tx.update(more['v'], state, params)


def test_says_so_when_there_is_nothing_to_compensate():
  with pytest.warns(UserWarning, match='`compensated` does nothing'):
    optax_mp.compensated(optax.sgd(0.1)).init(jnp.ones(3))


def test_layers_of_a_stack_and_leaves_get_different_noise():
  tx = optax_mp.compensated(optax.sgd(1.0), 0)
  params = {k: jnp.ones((2, 1000), jnp.bfloat16) for k in 'ab'}
  grads = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3), params)
  new, _ = _jitted(tx, grads, tx.init(params), params)
  rows = np.concatenate([np.asarray(new['a']), np.asarray(new['b'])])
  up = (rows == 1).astype(float)
  assert 0 < up.mean() < 1
  correlation = np.corrcoef(up) - np.eye(4)
  assert np.abs(correlation).max() < 5 / np.sqrt(1000)


def test_noise_changes_from_step_to_step():
  tx = optax_mp.compensated(optax.sgd(1e-3), 0)
  params = jnp.ones(1000, jnp.bfloat16)
  state = tx.init(params)
  first, state = _jitted(tx, jnp.ones(1000), state, params)
  second, _ = _jitted(tx, jnp.ones(1000), state, params)
  assert np.any(first != second)
  assert isinstance(formats.BFloat16('stochastic'), formats.Format)
