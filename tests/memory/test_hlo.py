# SPDX-License-Identifier: Apache-2.0
"""Bytes moved, counted in optimized HLO: exact, by hand."""

import jax
import jax.numpy as jnp
import pytest

from compilers import compile_for
from optax_mp import memory
from optax_mp.memory import _hlo
from optax_mp.memory import _traffic

N = 1024
MATRIX = jax.ShapeDtypeStruct((N, N), jnp.float32)
BYTES = 4 * N * N


def _moved_by(text):
  return _traffic.Traffic(_hlo.Program(text)).bytes


def _moved(target, fn, *args, **kwargs):
  return memory.report(compile_for(target, fn, *args, **kwargs)).bytes_moved


@pytest.mark.parametrize('target', ['cpu', 'h100', 'tpu-v6e'])
def test_a_fusion_reads_and_writes_once(target):
  moved = _moved(target, lambda x, y: jnp.sin(x) * y + x, MATRIX, MATRIX)
  assert moved == 3 * BYTES


@pytest.mark.parametrize('target', ['cpu', 'h100', 'tpu-v5e'])
def test_loops_count_every_trip(target):
  def step(x):
    return jax.lax.fori_loop(2, 9, lambda i, x: jnp.cos(x) + i, x)

  large = jax.ShapeDtypeStruct((8 * N, 8 * N), jnp.float32)
  compiled = compile_for(target, step, large, donate_argnums=0)
  report = memory.report(compiled)
  assert 0 <= report.bytes_moved - 7 * 2 * 64 * BYTES < 0.01 * BYTES
  assert report.unknown_loops == 0


@pytest.mark.parametrize('target', ['cpu', 'h100', 'tpu-v5e'])
def test_loops_that_depend_on_data_are_told(target):
  def step(x, n):
    return jax.lax.fori_loop(0, n, lambda i, x: jnp.cos(x) + i, x)

  report = memory.report(compile_for(target, step, MATRIX, jnp.int32(3)))
  assert report.unknown_loops == 1
  assert 'moved in one run, 1 loops once' in str(report)


@pytest.mark.parametrize('target', ['cpu', 'h100', 'tpu-v5e'])
def test_updates_in_place_move_what_is_updated(target):
  """Claim: some rows, not the matrix."""
  x = jax.ShapeDtypeStruct((16 * N, N), jnp.float32)
  i = jax.ShapeDtypeStruct((8,), jnp.int32)
  v = jax.ShapeDtypeStruct((8, N), jnp.float32)

  def step(x, i, v):
    return x.at[i].add(v)

  moved = _moved(target, step, x, i, v, donate_argnums=0)
  assert 2 * 4 * 8 * N <= moved < 0.1 * 16 * BYTES


def test_padding_is_moved_too():
  """Exact: as large as the arguments, which a TPU pads to tiles."""
  x = jax.ShapeDtypeStruct((2**20, 3), jnp.float32)
  report = memory.report(compile_for('tpu-v5e', jnp.sin, x))
  assert report.argument_bytes > 1.3 * 4 * x.size
  assert report.bytes_moved == report.argument_bytes + report.output_bytes


@pytest.mark.parametrize('target', ['cpu', 'h100', 'tpu-v5e'])
def test_of_a_stack_only_the_slice_is_moved(target):
  """A scan reads layer after layer, and writes one after the other."""
  stack = jax.ShapeDtypeStruct((16, N, N), jnp.float32)

  def step(x, stack):
    def body(x, layer):
      x = jnp.sin(x + layer)
      return x, x * 2

    return jax.lax.scan(body, x, stack)

  moved = _moved(target, step, MATRIX, stack)
  # Read x and a layer, write x and a layer; twice that, and a first result of
  # zeros, where x is copied. The whole stack in each trip would be 32 layers.
  # A TPU keeps x in vector memory.
  least = 2 if target == 'tpu-v5e' else 4
  assert 16 * least * BYTES <= moved <= 16 * (8 + 1) * BYTES + 2 * BYTES + 1024


def test_what_a_tpu_keeps_in_vector_memory_does_not_count():
  """A matrix copied there is read once, and fusions there move nothing."""
  text = """
HloModule m

%fused (a: f32[8,8], b: f32[8,8]) -> (f32[8,8], f32[8,8]) {
  %a = f32[8,8]{1,0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  %s = f32[8,8]{1,0} add(%a, %b)
  ROOT %t = (f32[8,8]{1,0}, f32[8,8]{1,0}) tuple(%s, %a)
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %c = (f32[8,8]{1,0:S(1)}, f32[8,8]{1,0}, u32[]{:S(2)}) \
copy-start(%x)
  %d = f32[8,8]{1,0:S(1)} copy-done(%c)
  %f = (f32[8,8]{1,0:S(1)}, f32[8,8]{1,0}) \
fusion(%d, %d), kind=kLoop, calls=%fused
  ROOT %r = f32[8,8]{1,0} get-tuple-element(%f), index=1
}
"""
  matrix = 4 * 64
  assert _moved_by(text.replace('\\\n', '')) == 2 * matrix


@pytest.mark.parametrize(
  'start, moved',
  [
    # A quarter of a matrix is read into vector memory ...
    (
      '((f32[8,8]{1,0}), f32[2,8]{1,0:S(1)}, s32[]{:S(2)}) '
      'slice-start(%x), slice={[0:2], [0:8]}',
      64,
    ),
    # ... written back, ...
    (
      '((f32[8,8]{1,0}, f32[2,8]{1,0:S(1)}, s32[], s32[]), f32[8,8]{1,0}, '
      'u32[]{:S(2)}) dynamic-update-slice-start(%x, %u, %i, %i)',
      64,
    ),
    # ... or copied within main memory.
    (
      '((f32[8,8]{1,0}, s32[], s32[]), f32[2,8]{1,0}, u32[]{:S(2)}) '
      'dynamic-slice-start(%x, %i, %i)',
      128,
    ),
    ('f32[8,8]{1,0} all-reduce-start(%x)', 512),
    ('(f32[8,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%x)', 768),
  ],
)
def test_copies_beside_the_computation(start, moved):
  text = f"""
ENTRY %main (x: f32[8,8]) -> f32[8,8] {{
  %x = f32[8,8]{{1,0}} parameter(0)
  %s = {start}
  ROOT %d = f32[8,8]{{1,0}} any-done(%s)
}}
"""
  assert _moved_by(text) == moved


def test_branches_count_as_the_largest():
  text = """
HloModule m

%small (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%p)
}

%large (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  %a = f32[8]{0} negate(%q)
  ROOT %b = f32[8]{0} negate(%a)
}

ENTRY %main (i: s32[], x: f32[8]) -> f32[8] {
  %i = s32[] parameter(0)
  %x = f32[8]{0} parameter(1)
  ROOT %c = f32[8]{0} conditional(%i, %x, %x), \
branch_computations={%small, %large}, metadata={op_name="jit(f)/cond"}
}
"""
  program = _hlo.Program(text)
  assert _moved_by(text) == 2 * 2 * 32
  assert program.op_names() == {'c': 'jit(f)/cond'}


@pytest.mark.parametrize(
  'shape, size',
  [
    ('bf16[3,5]{1,0}', 30),
    ('s4[3,5]{1,0}', 8),
    ('s4[3,5]{1,0:T(64,128)(8,1)}', 64 * 128 // 2),
    ('f32[3,300]{0,1:T(8,128)}', 4 * 304 * 128),
    ('f8e4m3fn[7]{0}', 7),
    ('pred[]', 1),
    ('(u8[4]{0}, f32[2]{0:T(128)S(1)}, /*index=2*/u32[])', 8),
    ('c64[2]', 16),
    ('token[]', 0),
  ],
)
def test_bytes_of_a_shape(shape, size):
  text = f'ENTRY %main () -> {shape} {{\n  %r = {shape} rng()\n}}\n'
  assert _moved_by(text) == size
