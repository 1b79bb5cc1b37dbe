# SPDX-License-Identifier: Apache-2.0
"""The buffers at the peak, read from what XLA dumps."""

import jax
import jax.numpy as jnp
import pytest

from compilers import CPU_TELLS_BUFFERS
from compilers import compile_for
import optax_mp
from optax_mp import memory
from optax_mp.memory import _buffers
from optax_mp.memory import gpt

ASSIGNMENT = """BufferAssignment:
allocation 0: size 4096, page 0, parameter 0, shape |f32[1024]| at \
ShapeIndex {}, maybe-live-out:
 value: <9 done{0} @0> (size=1024,offset=0): u8[1024]{0}
 value: <1 p.1 @0> (size=4096,offset=0): f32[1024]{0:T(1024)}
allocation 1: size 2048, parameter 1, shape |bf16[1024]| at ShapeIndex {}:
 value: <2 p.2 @0> (size=2048,offset=0): bf16[1024]{0}
allocation 2: size 512, output shape is |f32[128]|, maybe-live-out:
 value: <3 out @0> (size=512,offset=0): f32[128]{0}
allocation 3: size 9000, page 0, preallocated-temp:
 value: <4 early @0> (size=3000,offset=0): f32[750]{0}
 value: <5 late @0> (size=5000,offset=0): f32[1250]{0}
 value: <6 late.alias @0> (size=5000,offset=0): s32[1250]{0}
 value: <7 both{1} @0> (size=4000,offset=5000): f32[1000]{0}
 value: <12 last @0> (size=100,offset=0): f32[25]{0}
 value: <8 table{} @0> (size=16,offset=8992): (f32[750]{0}, f32[1000]{0})
allocation 4: size 1000000, color 1, page 0, preallocated-temp:
 value: <10 fast @1> (size=1000000,offset=0): f32[250000]{0:S(1)}
allocation 5: size 700, thread-local:
 value: <11 inner @0> (size=700,offset=0): f32[175]{0}

Total bytes used: whatever
"""
RANGES = """HloLiveRange (max 9):
  InstructionSequence:
    0:p.1
  BufferLiveRange:
    early{}:1-4
    late{}:5-7
    late.alias{}:6-8
    both{1}:3-6
    table{}:1-8
    fast{}:1-8
    last{}:9-9
"""


def _read(folder, assignment=ASSIGNMENT, ranges=RANGES):
  stem = folder / 'module_0001.jit_step.after_optimizations-'
  for name, text in (('buffer-assignment', assignment), ('live-range', ranges)):
    if text is not None:
      stem.with_name(f'{stem.name}{name}.txt').write_text(text)
  return _buffers.Dump.read(folder)


def test_what_is_live_at_the_peak(tmp_path):
  """Exact, by hand: 5000 + 4000 from step 5 on; 3000 + 4000 before."""
  dump = _read(tmp_path)
  assert [(b.kind, b.name, b.shape, b.bytes) for b in dump.buffers] == [
    ('temporary', 'late', 'f32[1250]', 5000),
    ('argument', 'parameter 0', 'f32[1024]', 4096),
    ('temporary', 'both', 'f32[1000]', 4000),
    ('argument', 'parameter 1', 'bf16[1024]', 2048),
    ('output', 'out', 'f32[128]', 512),
  ]
  assert dump.sizes == {
    'argument_size_in_bytes': 4096 + 2048,
    'output_size_in_bytes': 4096 + 512,
    'alias_size_in_bytes': 4096,
    'temp_size_in_bytes': 9000,
    'generated_code_size_in_bytes': 0,
  }


def test_other_texts_tell_nothing(tmp_path):
  assert _buffers.Dump.read(tmp_path) is None
  assert _read(tmp_path, 'Something else\n') is None
  assert _read(tmp_path, ASSIGNMENT, None) is not None  # ranges are still there
  (tmp_path / 'other').mkdir()
  assert _read(tmp_path / 'other', ASSIGNMENT, None) is None


# XLA:GPU leaves gaps between temporaries, which weigh more in a smaller model:
# a third of them where layers are 256 wide. There a TPU has them in vector
# memory.
@pytest.mark.parametrize(
  'target, share', [('cpu', 0.95), ('h100', 0.8), ('tpu-v5e', 0.8)]
)
def test_buffers_add_up_to_the_peak(target, share):
  """Claim: all of a whole step, but for the gaps between them, 15 %."""
  if target == 'cpu' and not CPU_TELLS_BUFFERS:
    pytest.skip('this jaxlib writes no live ranges')
  size = gpt.Size(4, 1024, vocabulary=2048, context=128)
  tx = optax_mp.adamw_bf16(1e-3)
  params = gpt.shapes(size, jnp.bfloat16)
  args = params, jax.eval_shape(tx.init, params), gpt.tokens(size)
  compiled = compile_for(
    target, gpt.make_step(tx), *args, donate_argnums=(0, 1)
  )
  report = memory.report(compiled)
  data = report.peak_bytes - report.generated_code_bytes
  total = sum(buffer.bytes for buffer in compiled.buffers)
  assert 0.85 * data < total <= data
  kinds = {
    kind: sum(b.bytes for b in compiled.buffers if b.kind == kind)
    for kind in ('argument', 'temporary')
  }
  assert kinds['argument'] == pytest.approx(report.argument_bytes, rel=0.001)
  assert kinds['temporary'] <= report.temporary_bytes
  assert kinds['temporary'] >= share * report.temporary_bytes


@pytest.mark.parametrize('target', ['h100', 'tpu-v5e'])
def test_sizes_of_a_dump_are_those_of_the_compiler(target):
  """Claim: so a refused program has the right ones; a TPU aligns to 16 KiB."""
  x = jax.ShapeDtypeStruct((2048, 2048), jnp.float32)

  def step(x, y):
    return x + y, jnp.sort(x * y, axis=0)

  compiled = compile_for(target, step, x, x, donate_argnums=0)
  report = memory.report(compiled)
  total = sum(b.bytes for b in compiled.buffers if b.kind != 'temporary')
  outputs = report.output_bytes - report.alias_bytes
  assert 0 <= report.argument_bytes + outputs - total <= 1024
