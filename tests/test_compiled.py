# SPDX-License-Identifier: Apache-2.0
"""What the compilers make of a step: memory, aliasing, and the residuals."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compilers import compile_for
import optax_mp
from optax_mp import formats
from optax_mp import memory
import tables
import train_gpt

TARGETS = ['tpu-v5e', 'h100']
RECIPES = {
  'adamw_bf16': lambda bits: optax_mp.adamw_bf16(1e-3, residual_bits=bits),
  'sgdm_bf16': lambda bits: optax_mp.sgdm_bf16(1e-3, residual_bits=bits),
  'lion_bf16': lambda bits: optax_mp.lion_bf16(1e-3, residual_bits=bits),
}
# A kernel's window into the arrays, whatever their size: one byte per parameter
# would be 12 times as much.
WINDOW = 2**20
SHAPES = [(4096, 4096), (8, 1024, 2048), (50257, 256)]
# Whose large matrices `test_budgets.py` compiles, with the same claim.
BUDGETED = ('adamw_bf16',)


def _step(tx):
  def step(grads, params, state):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return step


def _compile(target, tx, params):
  state = jax.eval_shape(tx.init, params)
  compiled = compile_for(
    target, _step(tx), params, params, state, donate_argnums=(1, 2)
  )
  leaves = jax.tree.leaves((params, state))
  return compiled, sum(x.size * x.dtype.itemsize for x in leaves)


@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('bits', [16, 8, 0])
@pytest.mark.parametrize('name', RECIPES)
def test_the_step_adds_no_memory(name, bits, target):
  """Claim: less than `WINDOW`, and everything donated is reused."""
  for shape in SHAPES[1:] if name in BUDGETED else SHAPES[:1]:
    params = {'w': jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
    compiled, donated = _compile(target, RECIPES[name](bits), params)
    report = memory.report(compiled)
    assert report.temporary_bytes < WINDOW, shape
    # Tiles are padded on a TPU, so it counts a little more.
    assert report.alias_bytes >= donated
    assert report.alias_bytes < 1.01 * donated + 8192


@pytest.mark.parametrize('target', TARGETS)
def test_a_whole_step_peaks_a_fifth_lower(target):
  """Claim: the example's GPT, 85 M parameters, against AdamW in float32.

  Both compute in bfloat16 and recompute activations; a batch of 256 tokens.
  """

  def compiler(function, donated, *args):
    return compile_for(target, function, *args, donate_argnums=donated)

  size = dict(layers=12, width=768, heads=12, context=256, batch=1)
  peaks = {}
  for optimizer in ('adamw_fp32', 'adamw_bf16'):
    config = train_gpt.Config(
      optimizer=optimizer, compute_dtype='bfloat16', recompute=True, **size
    )
    built = train_gpt.setup(config, compiler=compiler)
    report = memory.report(built.programs['step'])
    peaks[optimizer] = report.peak_bytes - report.generated_code_bytes
  assert peaks['adamw_bf16'] < 0.8 * peaks['adamw_fp32'], peaks


@pytest.mark.parametrize('target', TARGETS)
def test_float16_adds_no_memory(target):
  tx = optax_mp.compensated(optax.sgd(1e-3, momentum=0.9))
  params = {'w': jax.ShapeDtypeStruct(SHAPES[0], jnp.float16)}
  compiled, _ = _compile(target, tx, params)
  assert memory.report(compiled).temporary_bytes < WINDOW


@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('name', tables.FORMATS)
def test_the_error_of_a_format_is_not_folded_away(name, target):
  """Exact: x - decode(encode(x)) is computed, not simplified to x - x = 0."""
  row = tables.FORMATS[name]

  def error(x, key):
    decoded = row.format.decode(row.format.encode(x, key), x)
    return x - decoded

  key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
  x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
  text = compile_for(target, error, x, key).as_text()
  assert not _folded(text)


@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('bits', [16, 8])
def test_the_residual_of_a_step_is_not_folded_away(bits, dtype, target):
  """Exact: nothing is subtracted from itself, no residual is a constant."""
  tx = optax_mp.compensated(optax.sgd(1e-3), bits)
  params = jax.ShapeDtypeStruct((256, 256), dtype)
  compiled, _ = _compile(target, tx, params)
  text = compiled.as_text()
  assert not _folded(text)
  written = re.findall(rf'= \(?[us]{bits}\[256,256\][^\n]*? (\w+)\(', text)
  assert written and 'broadcast' not in written


@pytest.mark.parametrize('target', TARGETS)
def test_the_test_above_sees_folding(target):
  """Where a compiler folds, the naive form is what shows it: the GPU's."""

  def naive(x):
    return x - x.astype(jnp.bfloat16).astype(jnp.float32)

  x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
  folded = _folded(compile_for(target, naive, x).as_text())
  assert folded is (target == 'h100')


def test_the_residual_is_alive_on_the_cpu():
  """Exact: what is stored beside the value is not zero."""
  x = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, 1000), jnp.float32)
  found = 0
  for name, row in tables.FORMATS.items():
    if not row.axes:  # else refused
      stored = jax.jit(row.format.encode)(x, jax.random.key(0))
      residuals = _residuals(stored)
      found += len(residuals)
      assert all(jnp.mean(r != 0) > 0.9 for r in residuals), name
  assert found >= 10


def _residuals(stored):
  """Arrays of what was left over: low halves, and all of a second format."""
  match stored:
    case formats.HighLow():
      return [stored.low]
    case formats.Feedback():
      return [x for x in jax.tree.leaves(stored.residual) if x.size == 1000]
  return []


@pytest.mark.parametrize('mode', ['separate', 'fused'])
def test_donation_on_the_cpu(mode):
  """Exact: what is aliased is as large as parameters and state together.

  `separate` donates gradients and state, and the new parameters go into the
  gradients' memory; `fused` donates parameters and state.
  """
  tx = optax_mp.adamw_bf16(1e-3)
  params = {
    'w': jnp.ones((256, 64), jnp.bfloat16),
    'b': jnp.ones(64, jnp.bfloat16),
  }
  state = tx.init(params)

  def loss(params):
    return sum(jnp.sum(p.astype(jnp.float32) ** 2) for p in params.values())

  def separate(grads, state, params):
    return _step(tx)(grads, params, state)

  def fused(params, state):
    return _step(tx)(jax.grad(loss)(params), params, state)

  args = {'separate': (params, state, params), 'fused': (params, state)}[mode]
  step = {'separate': separate, 'fused': fused}[mode]
  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()
  size = sum(x.nbytes for x in jax.tree.leaves((params, state)))
  assert memory.report(compiled).alias_bytes == size


def test_a_split_is_one_pass_on_a_tpu():
  """Claim: the bytes moved are those read and those written, each once."""
  split = formats.Split(16)

  def step(low, high, update):
    x = split.decode(formats.HighLow(high, low), update)
    return split.encode(x + update)[::-1]

  shape = (4096, 4096)
  low = jax.ShapeDtypeStruct(shape, jnp.uint16)
  high = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  update = jax.ShapeDtypeStruct(shape, jnp.float32)
  compiled = compile_for(
    'tpu-v5e', step, low, high, update, donate_argnums=(0, 1)
  )
  moved = compiled.cost_analysis()['bytes accessed'] / low.size
  assert moved < 1.01 * (2 + 2 + 4 + 2 + 2)


def _folded(hlo):
  """Whether a program subtracts a number from itself, or returns a constant."""
  subtracts = re.findall(r'subtract\(([^)]*)\)', hlo)
  same = any(len(set(s.split(', '))) == 1 for s in subtracts)
  root = re.search(r'ENTRY.*?ROOT [^\n]*', hlo, re.S)
  assert root is not None
  constant = re.search(r'ROOT %?\S+ = \S+ broadcast\(', root[0]) is not None
  return same or constant or not subtracts
