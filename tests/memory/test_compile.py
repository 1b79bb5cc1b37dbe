# SPDX-License-Identifier: Apache-2.0
"""`memory.compile_for`: what is compiled is the step that would run."""

import functools
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from flax import nnx
import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compilers import CPU_TELLS_BUFFERS
from compilers import compile_for
import optax_mp
from optax_mp import memory
from optax_mp.memory import _targets
from optax_mp.memory import _worker

P = jax.sharding.PartitionSpec
TARGETS = ['tpu-v5e', 'h100']
COLLECTIVE = re.compile(
  r'(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)'
  r'(?:-start)?\('
)
SHAPE = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)


def _update(tx):
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return step


@pytest.fixture(scope='module')
def adamw():
  tx = optax_mp.adamw_bf16(1e-3)
  params = {'w': SHAPE}
  return _update(tx), (params, jax.eval_shape(tx.init, params), params)


@pytest.mark.parametrize('target', _targets.TARGETS)
def test_every_target(target, adamw):
  """Exact: the arguments are as large as their dtypes say, all are reused."""
  step, args = adamw
  compiled = compile_for(target, step, *args, donate_argnums=(0, 1))
  report = memory.report(compiled)
  sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(args)]
  # The smallest array on a TPU takes 512 bytes.
  assert 0 <= report.argument_bytes - sum(sizes) <= 512 * len(sizes)
  assert report.alias_bytes >= sum(sizes) - sizes[-1]
  assert report.fits and report.capacity_bytes > 15e9
  assert report.device == _targets.TARGETS[target].device
  if target != 'cpu' or CPU_TELLS_BUFFERS:
    names = {buffer.name for buffer in report.largest}
    assert {"params['w']", "grads['w']"} < names
    assert any(name.startswith("state.residual['w']") for name in names)
  assert target in memory.targets()


@pytest.mark.parametrize('target', TARGETS)
def test_arrays_and_shapes_are_the_same(target):
  tx = optax_mp.adamw_bf16(1e-3)
  params = {'w': jnp.ones((256, 128), jnp.bfloat16), 'scale': jnp.float32(1.0)}
  state = tx.init(params)
  shapes = jax.eval_shape(lambda *x: x, params, state, params)
  compiled = [
    compile_for(target, _update(tx), *args, donate_argnums=(0, 1))
    for args in ((params, state, params), shapes)
  ]
  assert compiled[0].memory_analysis() == compiled[1].memory_analysis()


@pytest.mark.parametrize('target', TARGETS + ['cpu'])
def test_static_unused_and_python_arguments(target):
  def step(x, mode, unused, scale, y):
    del unused
    return jnp.sin(x) * scale if mode == 'sin' else y

  x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
  plain = compile_for(
    target, step, x, 'sin', x, 2.0, x, donate_argnums=0, static_argnums=1
  )
  jitted = jax.jit(step, donate_argnums=(0,), static_argnames='mode')
  report = memory.report(plain)
  assert (
    memory.report(compile_for(target, jitted, x, 'sin', x, 2.0, x)) == report
  )
  # JAX drops the two arguments that are not used.
  assert 0 <= report.argument_bytes - (4 * 512**2 + 4) <= 1024
  assert report.alias_bytes == 4 * 512**2
  if target != 'cpu' or CPU_TELLS_BUFFERS:
    assert [b.name for b in report.largest[:2]] == ['x', 'scale']


def test_donation_is_said_once():
  jitted = jax.jit(lambda x: x, donate_argnums=0)
  with pytest.raises(ValueError, match='`donate_argnums` is for a function'):
    memory.compile_for('cpu', jitted, SHAPE, donate_argnums=0)


def test_the_same_program_as_without_export(adamw):
  """Exact: on the CPU JAX compiles the step here and now, too."""
  step, args = adamw
  ours = compile_for('cpu', step, *args, donate_argnums=(0, 1))
  theirs = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()
  stats = theirs.memory_analysis()
  assert ours.memory_analysis().temp_size_in_bytes == stats.temp_size_in_bytes
  assert ours.cost_analysis() == theirs.cost_analysis()


DIRECT = """
import json, os, sys
from optax_mp.memory import _targets, _worker
os.environ.update(_worker._ENVIRONMENT)
import jax, jax.numpy as jnp, optax
from jax.experimental import topologies
import optax_mp
from optax_mp import memory
from optax_mp.memory import gpt

size = gpt.Size(2, 128, vocabulary=512, context=64)
tx = optax_mp.adamw_bf16(1e-3)
step = gpt.make_step(tx)
params = gpt.shapes(size, jnp.bfloat16)
args = params, jax.eval_shape(tx.init, params), gpt.tokens(size)
target = _targets.find(sys.argv[1])
ours = memory.compile_for(target.name, step, *args, donate_argnums=(0, 1))

device = topologies.get_topology_desc(**target.topology(1)).devices[0]
sharding = jax.sharding.SingleDeviceSharding(device)
args = jax.tree.map(
  lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
)
lowered = jax.jit(step, donate_argnums=(0, 1)).trace(*args).lower(
  lowering_platforms=(target.platform,)
)
theirs = lowered.compile(compiler_options=target.compiler_options)
print(json.dumps([
  [getattr(c.memory_analysis(), name + '_size_in_bytes') for name in (
    'argument', 'output', 'alias', 'temp', 'generated_code')] +
  [memory.report(c).bytes_moved]
  for c in (ours, theirs)
]))
"""


@pytest.mark.parametrize('target', TARGETS)
def test_the_same_program_as_in_one_process(target):
  """Exact: export, the other process and its flags change nothing."""
  if target not in memory.targets():
    pytest.skip(f'no compiler for {target}')
  done = subprocess.run(
    [sys.executable, '-c', DIRECT, target], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]
  ours, theirs = json.loads(done.stdout.splitlines()[-1])
  assert ours == theirs


@pytest.mark.parametrize('target', TARGETS)
def test_a_program_too_large_is_an_answer(target):
  """On a TPU the compiler refuses, and tells all the same."""
  x = jax.ShapeDtypeStruct((2**17, 2**17), jnp.float32)
  compiled = compile_for(target, lambda x: jnp.sort(x) + x, x, donate_argnums=0)
  report = memory.report(compiled)
  assert report.fits is False
  assert bool(compiled.refusal) == (target == 'tpu-v5e')
  assert report.argument_bytes == report.alias_bytes == 4 * 2**34
  assert report.peak_bytes >= 8 * 2**34
  assert report.largest[0].bytes == 4 * 2**34
  assert report.bytes_moved >= 16 * 2**34
  assert 'does not fit' in str(report)


@pytest.mark.parametrize(
  'target', [t for t in _targets.TARGETS if t.startswith('tpu')]
)
def test_capacity_is_what_the_compiler_allows(target):
  """Exact, to the two decimals that it prints."""
  x = jax.ShapeDtypeStruct((2**20, 2**18), jnp.float32)
  compiled = compile_for(target, lambda x: x * 2, x)
  said = re.search(r'available HBM \(([\d.]+)G\)', compiled.refusal)
  assert said is not None
  capacity = memory.report(compiled).capacity_bytes / 2**30
  assert f'{capacity:.2f}' == f'{float(said[1]):.2f}'


def _mesh(size):
  """One axis, and of automatic type: from JAX 0.12 on that has to be said."""
  return jax.sharding.AbstractMesh(
    (size,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )


def _fsdp_args(tx, mesh):
  def of(spec):
    return jax.sharding.NamedSharding(mesh, spec)

  params = {
    'w': jax.ShapeDtypeStruct(
      (2048, 1024), jnp.bfloat16, sharding=of(P('data', None))
    )
  }
  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=of(P('data') if x.ndim == 2 else P())
    ),
    jax.eval_shape(tx.init, params),
  )
  batch = jax.ShapeDtypeStruct(
    (256, 2048), jnp.bfloat16, sharding=of(P('data', None))
  )
  return params, state, batch


@pytest.mark.parametrize('target, size', [('tpu-v5e', 16), ('h100', 8)])
def test_several_devices(target, size):
  """Exact: each device has its part; weights are gathered, others stay."""
  tx = optax_mp.adamw_bf16(1e-3)
  mesh = _mesh(size)
  args = _fsdp_args(tx, mesh)

  def step(params, state, batch):
    def loss(params):
      return jnp.mean((batch @ params['w']).astype(jnp.float32) ** 2)

    return _update(tx)(params, state, jax.grad(loss)(params))

  compiled = compile_for(target, step, *args, donate_argnums=(0, 1), mesh=mesh)
  report = memory.report(compiled)
  assert report.num_devices == size
  local = sum(
    x.size * x.dtype.itemsize // (size if x.ndim == 2 else 1)
    for x in jax.tree.leaves(args)
  )
  assert 0 <= report.argument_bytes - local <= 512 * 8
  batch = args[2].size * 2 // size
  assert report.alias_bytes >= local - batch
  assert COLLECTIVE.search(compiled.as_text())


@pytest.mark.parametrize('target', TARGETS)
def test_a_mesh_of_two_axes_of_this_machines_devices(target):
  """The update alone moves nothing between devices, whatever the spec."""
  mesh = jax.make_mesh((4, 2), ('data', 'model'))
  tx = optax_mp.adamw_bf16(1e-3)
  sharding = jax.sharding.NamedSharding(mesh, P('data', 'model'))
  params = jax.device_put(jnp.ones((512, 1024), jnp.bfloat16), sharding)
  state = jax.jit(tx.init)(params)
  compiled = compile_for(
    target,
    _update(tx),
    params,
    state,
    params,
    donate_argnums=(0, 1),
    mesh=mesh,
  )
  assert not COLLECTIVE.search(compiled.as_text())
  local = 12 * params.size // 8
  assert 0 <= memory.report(compiled).argument_bytes - local <= 512 * 8


def test_specs_mean_the_mesh():
  mesh = _mesh(8)

  def step(x):
    return jax.lax.with_sharding_constraint(x * 2, P('data'))

  compiled = compile_for('h100', step, SHAPE, mesh=mesh)
  report = memory.report(compiled)
  assert report.argument_bytes == 2 * SHAPE.size  # replicated
  assert report.output_bytes == 2 * SHAPE.size // 8


@pytest.mark.parametrize(
  'target, size, match',
  [
    ('tpu-v5e', 12, r'slice of tpu-v5e; got 12. Slices have \[1, 2, 4'),
    ('h100', 16, 'one node of h100, of 8 devices; got 16'),
    ('cpu', 9, 'jax_num_cpu_devices'),
    ('h100', 0, 'have a device at least'),
  ],
)
def test_meshes_that_do_not_exist(target, size, match):
  mesh = _mesh(size)
  with pytest.raises(ValueError, match=f'`mesh` must.*{match}'):
    compile_for(target, jnp.sin, SHAPE, mesh=mesh)


def test_sharded_arguments_need_their_mesh():
  mesh = _mesh(8)
  sharding = jax.sharding.NamedSharding(mesh, P('data'))
  x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=sharding)
  with pytest.raises(ValueError, match='`mesh` must be the one that shards'):
    memory.compile_for('cpu', jnp.sin, x)


def test_descriptions_have_minor_versions_and_their_shared_memory():
  """Exact: of Turing a block may have all, of later ones not the last KiB."""
  t4, l4 = (_targets.find(name).topology(1) for name in ('t4', 'l4'))
  assert 'cuda_compute_capability { major: 7 minor: 5 }' in t4['target_config']
  assert 'shared_memory_per_block_optin: 65536\n' in t4['target_config']
  assert 'platform_version: "Compute Capability 8.9"' in l4['target_config']
  assert 'shared_memory_per_block_optin: 101376\n' in l4['target_config']


def test_who_has_no_bfloat16_is_told():
  """Exact: and float16 is what it is told to use."""
  noted = [name for name, t in _targets.TARGETS.items() if t.note]
  assert noted == ['t4']
  assert 'float16' in _targets.find('t4').note


def test_a_product_in_bfloat16_takes_float32_on_a_t4_alone():
  """Claim: 4 bytes a value of both operands, where an L4 needs none."""
  x = jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16)
  half = jax.ShapeDtypeStruct((2048, 2048), jnp.float16)
  taken = [
    memory.report(compile_for(target, jnp.matmul, x, x)).temporary_bytes
    for target, x in (('t4', x), ('t4', half), ('l4', x))
  ]
  assert taken[0] >= 8 * x.size > taken[1] + taken[2]


def test_unknown_targets_are_named():
  with pytest.raises(ValueError, match="one of tpu-v4, .*h100.*; got 'h1000'"):
    memory.compile_for('h1000', jnp.sin, SHAPE)


@pytest.mark.parametrize(
  'target, versions, command',
  [
    ('tpu-v5e', {'libtpu': None}, 'pip install .*libtpu'),
    (
      'h100',
      {'jax-cuda12-plugin': None},
      r"pip install 'jax-cuda12-plugin==1\.2\.3' 'jax-cuda12-pjrt==1\.2\.3'",
    ),
    (
      'h100',
      {'jax-cuda12-pjrt': '1.2.2'},
      r"is of version 1\.2\.2, jaxlib of 1\.2\.3\. Run: pip .*=1\.2\.3'",
    ),
    ('h200', {'flatbuffers': None}, 'pip install .*flatbuffers'),
  ],
)
def test_a_missing_compiler_names_the_command(
  target, versions, command, monkeypatch
):
  def version(package):
    found = versions.get(package, '1.2.3')
    if found is None:
      raise importlib.metadata.PackageNotFoundError(package)
    return found

  monkeypatch.setattr(importlib.metadata, 'version', version)
  with pytest.raises(
    ValueError, match=f'`target`.*no compiler here: .*{command}'
  ):
    memory.compile_for(target, jnp.sin, SHAPE)


def test_importing_touches_no_plugin():
  """And compiling for a TPU none of TPUs: another process does it.

  JAX loads the plugin for GPUs when it first asks for a device of any kind.
  """
  code = """
def loaded(library):
  return library in open('/proc/self/maps').read()

from optax_mp import memory
assert not loaded('libtpu.so') and not loaded('xla_cuda_plugin.so')
import jax.numpy as jnp
if 'tpu-v5e' in memory.targets():
  memory.compile_for('tpu-v5e', jnp.sin, jnp.ones((8, 128)))
assert not loaded('libtpu.so')
"""
  subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('target', TARGETS)
def test_a_compiler_that_fails(target):
  """Its words come through, and it goes on."""

  def step(x):
    return jax.ffi.ffi_call('nobody_has_this', x)(x)

  x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
  with pytest.raises(RuntimeError, match='compiler failed: .*nobody_has_this'):
    compile_for(target, step, x)
  assert compile_for(target, jnp.cos, SHAPE).as_text()


def test_a_compiler_that_dies(monkeypatch):
  """The error says how; the next compilation has a new process."""
  compile_for('h100', jnp.sin, SHAPE)
  for worker in _worker._idle['cuda']:
    worker.process.kill()
    worker.process.wait()
  with monkeypatch.context() as patch:
    code = 'import os, sys; print("I fall", file=sys.stderr); os.abort()'
    patch.setattr(_worker, '_PROGRAM', code)
    with pytest.raises(RuntimeError, match='died with exit code -6: .*I fall'):
      compile_for('h100', jnp.sin, SHAPE)
  assert compile_for('h100', jnp.cos, SHAPE).as_text()


def test_dtypes_that_cannot_travel():
  x = jax.ShapeDtypeStruct((64, 128), jnp.int2)
  with pytest.raises(ValueError, match='`fn` has arrays of dtype .*int2'):
    compile_for('h100', lambda x: x + x, x)


@pytest.mark.parametrize(
  'dtype', [jnp.int4, jnp.uint4, jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2]
)
@pytest.mark.parametrize('target', TARGETS)
def test_small_dtypes_count_their_bits(target, dtype):
  x = jax.ShapeDtypeStruct((1024, 1024), dtype)
  report = memory.report(compile_for(target, lambda x: x.astype(float), x))
  bits = 4 if '4' in jnp.dtype(dtype).name[:6].replace('float', '') else 8
  assert report.argument_bytes == x.size * bits // 8
  assert report.bytes_moved == x.size * bits // 8 + 4 * x.size


def test_an_interrupted_question_has_no_answer(monkeypatch):
  """What comes late belongs to nobody: its process is gone."""
  compile_for('h100', jnp.sin, SHAPE)
  killed = _worker._idle['cuda'][-1].process.pid
  assert _folders(killed)
  with monkeypatch.context() as patch:

    def interrupted(*_):
      raise KeyboardInterrupt

    patch.setattr(_worker.pickle, 'load', interrupted)
    with pytest.raises(KeyboardInterrupt):
      compile_for('h100', jnp.tanh, (x := SHAPE))
  report = memory.report(compile_for('h100', lambda x, y: x + y, x, x))
  assert report.argument_bytes == 2 * 2 * SHAPE.size
  assert not _folders(killed)


def _folders(pid):
  return list(pathlib.Path(tempfile.gettempdir()).glob(f'optax_mp_{pid}_*'))


def test_processes_and_folders_go_with_their_caller():
  """Also where nobody could clean up."""
  code = """
import os, signal
import jax.numpy as jnp
from optax_mp import memory
from optax_mp.memory import _worker
memory.compile_for('h100', jnp.sin, jnp.ones((8, 128)))
(worker,) = _worker._idle['cuda']
print(worker.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
  if 'h100' not in memory.targets():
    pytest.skip('no compiler for h100')
  done = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE)
  pid = int(done.stdout)
  for _ in range(100):
    if not pathlib.Path(f'/proc/{pid}').exists():
      break
    time.sleep(0.1)
  else:
    raise AssertionError('the compiler outlives its caller')
  assert not _folders(pid)


def test_a_fork_leaves_the_compiler_alone():
  compile_for('h100', jnp.sin, SHAPE)
  code = """
import os, sys
import jax.numpy as jnp
from optax_mp import memory
from optax_mp.memory import _worker
x = jnp.ones((8, 128))
memory.compile_for('h100', jnp.sin, x)
if pid := os.fork():
  assert os.waitpid(pid, 0)[1] == 0
  memory.compile_for('h100', jnp.cos, x)
else:
  _worker._close()  # as at the end of Python; JAX's own end may crash in a fork
  os._exit(0)
"""
  subprocess.run(
    [sys.executable, '-W', 'ignore', '-c', code], check=True, timeout=120
  )


@pytest.mark.parametrize('target', TARGETS + ['cpu'])
def test_64_bits(target):
  with jax.enable_x64(True):
    x = jax.ShapeDtypeStruct((512, 512), jnp.float64)
    n = jax.ShapeDtypeStruct((), jnp.int64)
    report = memory.report(compile_for(target, lambda x, n: x * n, x, n))
  assert report.output_bytes >= 8 * x.size


@pytest.mark.parametrize('target', TARGETS + ['cpu'])
def test_what_cannot_travel_says_why(target):
  def prints(x):
    jax.debug.print('{}', x[0, 0])
    return x * 2

  with pytest.raises(ValueError, match='`fn` must not call the host'):
    compile_for(target, prints, SHAPE)
  model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='`fn` must be a function or `jax.jit`'):
    compile_for(target, nnx.jit(lambda m, x: m(x)), model, jnp.ones((2, 4)))
  kind = jax.sharding.SingleDeviceSharding(
    jax.devices()[0], memory_kind='pinned_host'
  )
  x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=kind)
  with pytest.raises(ValueError, match='`args` must be in device memory; got'):
    compile_for(target, jnp.sin, x)


def test_pallas_kernels_travel():
  """Custom calls that `jax.export` guards are compiled all the same."""

  def kernel(x_ref, y_ref):
    y_ref[...] = x_ref[...] * 2.0

  def step(x):
    return pl.pallas_call(kernel, jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

  x = jax.ShapeDtypeStruct((1024, 512), jnp.float32)
  report = memory.report(compile_for('tpu-v5e', step, x))
  assert report.bytes_moved == 2 * 4 * x.size


@functools.partial(jax.jit, donate_argnums=0)
def _jitted(x):
  return x * 2


def test_constants_and_results_come_through():
  """Exact: an array that the step closes over is part of the program."""
  table = np.arange(256 * 256, dtype=np.float32).reshape(256, 256)
  x = jnp.ones((256, 256))
  report = memory.report(compile_for('h100', lambda x: _jitted(x) + table, x))
  assert report.argument_bytes == x.nbytes == report.output_bytes
