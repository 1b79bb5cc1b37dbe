# SPDX-License-Identifier: Apache-2.0
"""MicroAdam against recorded runs, a slow reference, and its hazards."""

import dataclasses

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from compilers import compile_for
from optax_mp import compressed
from optax_mp import formats
from optax_mp import memory
from optax_mp import optimizers
import quick
import recorded
from reference import micro_adam as reference

RECORDED = recorded.cases('microadam')
EXACT = [name for name, c in RECORDED.items() if c['reference_float64_steps']]


def like(case, dtype):
  hyper = case['hyper']
  return optimizers.micro_adam(
    hyper['lr'],
    hyper['m'],
    hyper['density'],
    b1=hyper['betas'][0],
    b2=hyper['betas'][1],
    eps=hyper['eps'],
    block_size=hyper['d_block_size'],
    residual=formats.Affine(4, hyper['quant_block_size'], dtype),
    values_dtype=dtype,
    weight_decay=hyper['weight_decay'],
    alpha=hyper['alpha'],
  )


@pytest.mark.parametrize('name', EXACT)
def test_follows_the_recorded_reference(name):
  """Codes are equal, and so is what was selected."""
  case, key = RECORDED[name], 'reference_float64_steps'
  states = recorded.assert_follows(like(case, 'float32'), case, key=key)
  for t, (state, step) in enumerate(zip(states, case[key], strict=True)):
    codes, (low, high) = state[0].residual
    codes = np.asarray(codes, np.int32).ravel() + 8
    np.testing.assert_array_equal(codes, step['error_codes'])
    recorded.assert_state(low, step['mins'])
    recorded.assert_state(high, step['maxs'])
    newest = np.reshape(state[0].indices, (case['hyper']['m'], -1))[t]
    np.testing.assert_array_equal(np.sort(newest), step['last_indices'])


@dataclasses.dataclass(frozen=True)
class InBFloat16:
  """A format of values that are bfloat16 before and after."""

  format: formats.Affine

  def encode(self, x, key=None):
    return self.format.encode(rounded(x), key)

  def decode(self, stored, like):
    return rounded(self.format.decode(stored, like))


def rounded(x):
  return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


@pytest.mark.parametrize('name', RECORDED)
def test_follows_the_official_code_in_bfloat16(name):
  """With its roundings: of errors, of sums with them, of quotients, of weights.

  Exact, what is stored: which entries were selected, their values, codes and
  ends. Claim: each weight within one ulp, a step from where the official one
  was; PyTorch rounds eta times the quotient in some places and not in others.
  """
  case = RECORDED[name]
  hyper = case['hyper']
  error = InBFloat16(formats.Affine(4, hyper['quant_block_size']))
  tx = optimizers.scale_by_micro_adam(
    hyper['m'], hyper['density'], residual=error, alpha=hyper['alpha']
  )

  @quick.jit
  def step(w, state, g, selected):
    left = error.decode(state.residual, g)
    total = rounded(g + left)
    # Of equal magnitudes it may take any: by less than bfloat16 can tell.
    total *= jnp.ones(g.size).at[selected].set(1 + 2.0**-12)
    u, state = tx.update(total - left, state)
    return rounded(w - hyper['lr'] * rounded(u)), state

  w = rounded(recorded.parameters(case)).ravel()
  state = tx.init(w)
  # At the fifth step of the last case zeros are half way between two codes; our
  # step from code to code is rounded, so that its products are exact.
  count = 4 if hyper['alpha'] else 6
  gradients = recorded.gradients(case)[:count]
  steps = case['official_bf16_steps'][:count]
  for t, (g, after) in enumerate(zip(gradients, steps, strict=True)):
    wanted = after['state']
    selected = jnp.array(wanted['I'][t])
    w, state = step(w, state, rounded(g).ravel(), selected)
    rows = (np.reshape(x, (hyper['m'], -1))[t] for x in state[1:3])
    indices, values = map(np.asarray, rows)
    order = np.argsort(indices), np.argsort(wanted['I'][t])
    np.testing.assert_array_equal(indices[order[0]], np.sort(selected))
    values = values.astype(np.float32)[order[0]]
    np.testing.assert_array_equal(values, np.array(wanted['V'][t])[order[1]])
    assert_official(state.residual, wanted)
    seen, w = w, recorded.array(after['param']).ravel()
    assert np.all(np.abs(seen - w) <= ulp(w))


def assert_official(stored, wanted):
  """Two codes a byte, the first one high; ends that may have one more."""
  packed = np.array(wanted['error_packed'])
  codes = np.stack([packed >> 4, packed & 15], 1).ravel()[: stored.codes.size]
  np.testing.assert_array_equal(np.asarray(stored.codes, np.int32) + 8, codes)
  for end, name in zip(stored.scales, ('min_vals', 'max_vals'), strict=True):
    end = np.asarray(end, np.float32)
    np.testing.assert_array_equal(end, wanted[name][: end.size])


def ulp(x):
  """Of bfloat16."""
  return 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)


CASES = [
  ((48, 7), 64, 0.05, 0.0),  # 5 blocks and a shorter one
  ((16, 16), 64, 0.1, 0.0),
  ((13,), 8, 0.2, 0.0),
  ((), 8, 0.2, 0.0),
  ((3, 1), 2, 0.5, 0.0),
  ((16, 16), 64, 0.1, 0.3),
]


@pytest.mark.parametrize(('shape', 'block', 'density', 'alpha'), CASES)
def test_follows_the_reference(shape, block, density, alpha):
  """Over more steps than the window has, with weight decay."""
  rng = np.random.default_rng(0)
  slow = reference.MicroAdam(
    3, density, block, 8, (0.9, 0.95, 1e-8), 1e-3, 0.1, alpha
  )
  tx = optimizers.micro_adam(
    1e-3,
    3,
    density,
    b2=0.95,
    block_size=block,
    residual=formats.Affine(4, 8, 'float32'),
    values_dtype='float32',
    alpha=alpha,
    weight_decay=0.1,
  )
  w = rng.normal(size=shape)
  grads = [rng.normal(size=shape) for _ in range(6)]
  ours = recorded.run(tx, jnp.asarray(w), [jnp.asarray(g) for g in grads])
  for (params, _), g in zip(ours, grads, strict=True):
    w = slow.step(w, g)
    np.testing.assert_allclose(params, w, rtol=0.0, atol=recorded.PARAMS)


@pytest.mark.parametrize('layout', ['flat', 'last_axis'])
def test_a_stack_is_its_layers(layout):
  """Exact; with a last axis apart so are rows."""
  rng = np.random.default_rng(1)
  tx = optimizers.scale_by_micro_adam(
    2, 0.2, block_size=8, residual=formats.Affine(4, 4), layout=layout
  )
  grads = [jnp.asarray(rng.normal(size=(3, 4, 10))) for _ in range(3)]
  exactly, quickly = jax.jit(tx.update), quick.jit(tx.update)

  def run(grads, step):
    state = tx.init(grads[0])
    for g in grads:
      updates, state = step(g, state)
    return updates

  apart = [run([g[i] for g in grads], exactly) for i in range(3)]
  np.testing.assert_array_equal(run(grads, exactly), np.stack(apart))
  if layout == 'last_axis':
    rows = [run([g[0, i] for g in grads], quickly) for i in range(4)]
    # kind: derived, compiled for another number of values.
    np.testing.assert_allclose(apart[0], np.stack(rows), rtol=1e-6)


@pytest.mark.parametrize(
  ('shape', 'layout', 'block'),
  [
    ((72, 8190), 'flat', 16384),
    ((515, 1023), 'last_axis', 1023),
  ],
)
def test_blocks_do_not_depend_on_how_many_there_are_at_once(
  shape, layout, block
):
  """Exact: several chunks, of which the last may be smaller.

  Two blocks of odd length stay together, a last one may have no neighbour.
  """
  g = jax.random.normal(jax.random.key(0), shape)
  tx = optimizers.scale_by_micro_adam(2, layout=layout)
  step = quick.jit(tx.update)  # how rows are cut is the same in any code
  whole, state = step(g, tx.init(g))
  for at in (0, g.size // block - 1, g.size // block):
    alone = g.ravel()[at * block : (at + 1) * block]
    if not alone.size:
      continue
    updates, own = step(alone, tx.init(alone))
    np.testing.assert_array_equal(
      whole.ravel()[at * block : (at + 1) * block], updates
    )
    if alone.size == block:
      codes = state.residual.codes[at]
      np.testing.assert_array_equal(codes, own.residual.codes)


@pytest.mark.parametrize(
  ('steps', 'size'), [(1, 1.0), (10, 1.0), (100, 2.0), (1000, 5.2)]
)
def test_steps_grow(steps, size):
  """Claim: with a constant gradient, as the docstring says; to its digits."""
  tx = optimizers.scale_by_micro_adam(density=1.0, values_dtype='float32')
  g = jnp.ones(4)

  @quick.jit
  def run(state):
    def body(state, _):
      return tx.update(g, state)[::-1]

    return jax.lax.scan(body, state, None, length=steps)[1][-1]

  np.testing.assert_allclose(run(tx.init(g)), size, atol=0.05)


def test_how_far_steps_grow():
  """Claim: 6.5 in the end, and 3.2 for what is in the newest alone."""
  tx = optimizers.scale_by_micro_adam(density=0.25, values_dtype='float32')
  late = tx.init(jnp.zeros(4))._replace(count=jnp.int32(10**6))
  step = quick.jit(tx.update)
  u, _ = step(jnp.array([1.0, 0, 0, 0]), late)
  np.testing.assert_allclose(u, [3.16, 0, 0, 0], atol=0.005)
  for _ in range(10):
    u, late = step(jnp.array([1.0, 0, 0, 0]), late)
  np.testing.assert_allclose(u, [6.5, 0, 0, 0], atol=0.05)


def test_equal_magnitudes_are_selected_in_order():
  tx = optimizers.scale_by_micro_adam(density=0.25)
  g = jnp.array([1.0, -2, 2, -2, 2, 2, 1, 1])
  _, state = quick.jit(tx.update)(g, tx.init(g))
  assert np.reshape(state.indices, (10, 2))[0].tolist() == [1, 2]


def test_zero_and_equal_gradients_stay_finite():
  """Buckets whose values are all equal have no step."""
  for g in (jnp.zeros((16, 16)), jnp.full((16, 16), 3.0)):
    tx = optimizers.scale_by_micro_adam()
    step, state = quick.jit(tx.update), tx.init(g)
    for _ in range(3):
      updates, state = step(g, state)
    chex.assert_tree_all_finite((updates, formats_free(state)))
    assert np.count_nonzero(updates) <= 3 * 3  # ceil(2.56) a step


def formats_free(state):
  return state.residual.scales, state.values


def test_what_is_left_out_comes_back():
  """An entry that is never the largest is selected once it has summed up."""
  tx = optimizers.scale_by_micro_adam(1, 1 / 4, values_dtype='float32')
  g = jnp.array([1.0, 0.4, 0.0, 0.0])
  step, state, moved = quick.jit(tx.update), tx.init(g), []
  for _ in range(4):
    updates, state = step(g, state)
    moved.append(int(np.argmax(updates)))
  assert 1 in moved


@pytest.mark.parametrize(
  'residual', [formats.BFloat16(), formats.BlockInt(8), formats.Split(8)]
)
def test_another_format_of_errors(residual):
  """Exact: what it keeps of all that is not selected."""
  g = jnp.asarray(np.random.default_rng(2).normal(size=(8, 128)))
  tx = optimizers.scale_by_micro_adam(residual=residual, density=0.1)
  step = jax.jit(tx.update)
  _, state = step(g, tx.init(g))
  selected = jnp.reshape(state.indices, (10, -1))[0]
  rest = g.ravel().at[selected].set(0.0)
  wanted = jax.jit(residual.encode)(rest)
  chex.assert_trees_all_equal(tuple(state.residual), tuple(wanted))
  updates, _ = step(g, state)
  chex.assert_tree_all_finite(updates)


@pytest.mark.parametrize('layout', ['flat', 'last_axis'])
def test_bytes(layout):
  """Exact: 0.9 bytes per parameter, what k is rounded up, and 4 a bucket."""
  shape = (4096, 4096)
  p = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  tx = optimizers.scale_by_micro_adam(layout=layout)
  plan = memory.plan(tx, p, gradients=None)
  kept = 164 / 16384 if layout == 'flat' else 41 / 4096
  wanted = 2 * 10 * 2 * kept + 1 / 2 + 4 / 64
  assert plan.total_bytes == wanted * 4096**2 + 2 * 4096**2 + 4
  np.testing.assert_allclose(wanted, 0.9 + 4 / 64, rtol=2e-3)


@pytest.mark.parametrize(('target', 'whole'), [('h100', 4), ('tpu-v5e', 9)])
def test_temporaries(target, whole):
  """Claim: so many bytes for each parameter, and what a chunk needs.

  Of blocks of odd length, which even ones need no more than.
  """
  tx = optimizers.micro_adam(1e-3, layout='last_axis')

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  p = jax.ShapeDtypeStruct((8192, 4095), jnp.bfloat16)
  args = p, jax.eval_shape(tx.init, p), p
  report = memory.report(
    compile_for(target, step, *args, donate_argnums=(0, 1))
  )
  chunk = 40 * 2**19
  assert report.temporary_bytes <= whole * p.size + chunk
  assert report.alias_bytes >= 2.96 * p.size


def test_rows_apart_lie_where_their_leaf_lies():
  """On eight devices, with automatic and with explicit axes."""
  if jax.device_count() < 8:
    pytest.skip('needs eight devices')
  g = jax.random.normal(jax.random.key(3), (3, 16, 64))
  tx = optimizers.scale_by_micro_adam(2, 0.1, layout='last_axis')
  alone, _ = quick.jit(tx.update)(g, tx.init(g))
  for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((8,), ('d',), axis_types=(kind,))
    sharding = NamedSharding(mesh, P(None, 'd', None))
    cut = jax.device_put(g, sharding)
    updates, state = quick.jit(tx.update)(cut, tx.init(cut))
    # kind: derived, other programs.
    np.testing.assert_allclose(updates, alone, rtol=1e-6, atol=1e-7)
    for x in jax.tree.leaves(state):
      spec = P(*sharding.spec[: x.ndim])
      assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


def test_compressed_leaves_what_is_in_a_format():
  """Exact; and says so where all else is rounded already."""
  params = {'w': jnp.ones((64, 64))}
  tx = optimizers.micro_adam(1e-3, values_dtype='float32')
  stored = compressed(tx, formats.Split(16), min_size=0)
  plain, state = tx.init(params), stored.init(params)
  step, stored_step = jax.jit(tx.update), jax.jit(stored.update)
  for _ in range(2):
    wanted, plain = step(params, plain, params)
    updates, state = stored_step(params, state, params)
  chex.assert_trees_all_equal(updates, wanted)
  inner = state.inner_state[0]
  chex.assert_trees_all_equal(inner.residual, plain[0].residual)
  assert formats.is_stored(inner.values['w'])
  with pytest.raises(ValueError, match='`inner` keeps .*values'):
    tx = compressed(optimizers.micro_adam(1e-3), formats.Split(8), min_size=0)
    tx.init(params)


FEEDBACK = formats.ErrorFeedback(
  formats.BFloat16(), formats.BFloat16('stochastic')
)


@pytest.mark.parametrize(
  ('wrong', 'argument'),
  [
    ({'window': 0}, 'window'),
    ({'density': 0.0}, 'density'),
    ({'density': 1.5}, 'density'),
    ({'block_size': 2**15}, 'block_size'),
    ({'eps': 0.0}, 'eps'),
    ({'b1': 1.0}, 'b1'),
    ({'alpha': 1.0}, 'alpha'),
    ({'layout': 'rows'}, 'layout'),
    ({'values_dtype': 'int8'}, 'values_dtype'),
    ({'residual': formats.BlockInt(4, signed=False)}, 'residual'),
    ({'residual': formats.BFloat16('stochastic')}, 'residual'),
    ({'residual': FEEDBACK}, 'residual'),
  ],
)
def test_errors_name_the_argument(wrong, argument):
  with pytest.raises(ValueError, match=f'`{argument}`.*got'):
    optimizers.scale_by_micro_adam(**wrong)


@dataclasses.dataclass(frozen=True)
class Named:
  """A format whose own words do not say how it rounds."""

  format: formats.BFloat16
  label: str = "rounding is not 'stochastic'"

  def encode(self, x, key=None):
    return self.format.encode(x, key)

  def decode(self, stored, like):
    return self.format.decode(stored, like)

  def __repr__(self):
    return self.label


def test_a_format_is_asked_how_it_rounds():
  optimizers.scale_by_micro_adam(residual=Named(formats.BFloat16()))
  noisy = Named(formats.BFloat16('stochastic'), 'Named()')
  with pytest.raises(ValueError, match='`residual`.*noise'):
    optimizers.scale_by_micro_adam(residual=noisy)


@pytest.mark.parametrize(
  ('argument', 'value'),
  [('window', 2), ('density', 0.5), ('block_size', 8), ('alpha', 0.0)],
)
def test_arrays_for_what_must_be_static_are_refused(argument, value):
  with pytest.raises(ValueError, match=f'`{argument}`.*static_args'):
    optimizers.scale_by_micro_adam(**{argument: jnp.asarray(value)})
