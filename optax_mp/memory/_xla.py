# SPDX-License-Identifier: Apache-2.0
"""Compiles an exported program and reads what the compiler says of it."""

import dataclasses
import pathlib
import tempfile
from typing import Any

import jax
from jax.experimental import topologies
import numpy as np

from optax_mp.memory import _buffers
from optax_mp.memory import _installed
from optax_mp.memory import _target


@dataclasses.dataclass(frozen=True)
class MemoryStats:
  """Sizes under the names that JAX's own ``memory_analysis()`` gives them."""

  argument_size_in_bytes: int
  output_size_in_bytes: int
  alias_size_in_bytes: int
  temp_size_in_bytes: int
  generated_code_size_in_bytes: int

  @classmethod
  def of(cls, stats: Any) -> 'MemoryStats':
    """Copies the fields from JAX's statistics."""
    fields = dataclasses.fields(cls)
    return cls(**{f.name: getattr(stats, f.name) for f in fields})


@dataclasses.dataclass(frozen=True, repr=False)
class Compiled:
  """A program compiled for a device that need not be here: it cannot be run.

  Has the methods of :class:`jax.stages.Compiled` that tell about a program.
  Everything is per device. Where the compiler refused the program because the
  device is too small, ``refusal`` has its words, and sizes and text are those
  of the program that it refused.
  """

  target: _target.Target
  device: str  # JAX's `device_kind`
  num_devices: int
  buffers: tuple[_buffers.Buffer, ...]  # at the peak; empty if unknown
  refusal: str
  stats: MemoryStats
  cost: dict[str, float] | None
  text: str

  def memory_analysis(self) -> MemoryStats:
    """Sizes in bytes."""
    return self.stats

  def cost_analysis(self) -> dict[str, float] | None:
    """XLA's cost model, None for GPUs."""
    return self.cost

  def as_text(self) -> str:
    """The optimized HLO."""
    return self.text

  def __repr__(self) -> str:
    return f'<Compiled for {self.num_devices} x {self.target.name}>'


@dataclasses.dataclass(frozen=True)
class Job:
  """What to compile: all but the program itself."""

  target: _target.Target
  num_devices: int
  axes: tuple[tuple[str, int, Any], ...]  # names, sizes and types; () for none
  donated: tuple[bool, ...]  # one for each argument of the program


def compile_exported(
  exported: jax.export.Exported, job: Job, dump: pathlib.Path | None = None
) -> Compiled:
  """Compiles for the devices of a job.

  Args:
    exported: of a function of arrays, one after the other.
    job: for what to compile.
    dump: the folder that XLA was told to dump to; None to tell it now.

  Returns:
    The compiled program, or what is known of it if it does not fit.
  """
  with tempfile.TemporaryDirectory() as folder:
    options = dict(job.target.compiler_options)
    if dump is None:
      dump = pathlib.Path(folder)
      options |= {'xla_dump_to': folder, 'xla_dump_hlo_as_text': True}
    for file in filter(pathlib.Path.is_file, dump.iterdir()):
      file.unlink()
    devices = _devices(job)
    lowered = _lower(exported, job, devices)
    try:
      compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      return _refused(error, job, devices[0].device_kind, dump)
    found = _buffers.Dump.read(dump)
    text = _text(compiled, dump)
  cost = compiled.cost_analysis()
  return Compiled(
    target=job.target,
    device=devices[0].device_kind,
    num_devices=job.num_devices,
    buffers=found.buffers if found else (),
    refusal='',
    stats=MemoryStats.of(compiled.memory_analysis()),
    cost=dict(cost) if cost else None,
    text=text,
  )


def _lower(
  exported: jax.export.Exported, job: Job, found: list[Any]
) -> jax.stages.Lowered:
  """Puts the program on the devices."""
  devices = np.array(found[: job.num_devices])
  one = (('all', 1, jax.sharding.AxisType.Auto),)
  names, sizes, types = zip(*(job.axes or one), strict=True)
  mesh = jax.sharding.Mesh(devices.reshape(sizes), names, axis_types=types)
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  if job.num_devices == 1:
    shardings = [jax.sharding.SingleDeviceSharding(devices[0])]
    shardings *= len(exported.in_avals)
  else:
    given = exported.in_shardings_jax(mesh)
    shardings = [replicated if s is None else s for s in given]
  shapes = [
    jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
    for a, s in zip(exported.in_avals, shardings, strict=True)
  ]
  # JAX drops arguments that a program does not use; one called, it uses all.
  kept = exported.module_kept_var_idx

  def call(*used):
    given = dict(zip(kept, used, strict=True))
    for i in set(range(len(shapes))) - set(kept):
      given[i] = jax.numpy.zeros(shapes[i].shape, shapes[i].dtype)
    return exported.call(*(given[i] for i in range(len(shapes))))

  donated = tuple(n for n, i in enumerate(kept) if job.donated[i])
  traced = jax.jit(call, donate_argnums=donated).trace(
    *(shapes[i] for i in kept)
  )
  lowered = traced.lower(lowering_platforms=(job.target.platform,))
  _inline(lowered.compiler_ir())
  return lowered


def _inline(module: Any) -> None:
  """Puts the exported program in place of its call, in StableHLO.

  XLA would do it, but number the operations in another order than those of the
  program that JAX compiles; and where two orders of execution are equally good,
  numbers decide, and so over memory.
  """
  functions = {
    op.attributes['sym_name'].value: op
    for op in module.body.operations
    if 'sym_name' in op.attributes
  }
  (main,) = functions['main'].regions[0].blocks
  calls = [
    op
    for op in main.operations
    if 'callee' in op.attributes
    and op.attributes['callee'].value.startswith('call_exported')
  ]
  if len(calls) != 1:
    return
  callee = functions[calls[0].attributes['callee'].value]
  (body,) = callee.regions[0].blocks
  for argument, operand in zip(body.arguments, calls[0].operands, strict=True):
    argument.replace_all_uses_with(operand)
  *operations, returned = body.operations
  for operation in operations:
    operation.move_before(calls[0])
  for result, value in zip(calls[0].results, returned.operands, strict=True):
    result.replace_all_uses_with(value)
  calls[0].erase()
  callee.erase()


def _devices(job: Job) -> list[Any]:
  if job.target.platform == 'cpu':
    devices = jax.devices('cpu')
    if len(devices) < job.num_devices:
      raise ValueError(
        f'`mesh` must not have more devices than this process; got '
        f'{job.num_devices} and {len(devices)}. Set them by '
        f"`jax.config.update('jax_num_cpu_devices', {job.num_devices})`, first "
        'of all.'
      )
    return devices
  topology = job.target.topology(job.num_devices)
  try:
    return topologies.get_topology_desc(**topology).devices
  except Exception as error:  # whatever a plugin raises
    raise RuntimeError(
      f'the installed compiler does not know {job.target.name}: {error} '
      f'Run: {_installed.command(job.target.platform)}'
    ) from error


def _refused(
  error: Exception, job: Job, device: str, dump: pathlib.Path
) -> Compiled:
  """What the compiler left of a program that is too large for the device."""
  found = _buffers.Dump.read(dump)
  if 'RESOURCE_EXHAUSTED' not in str(error) or found is None:
    raise error
  return Compiled(
    target=job.target,
    device=device,
    num_devices=job.num_devices,
    buffers=found.buffers,
    refusal=str(error).splitlines()[0],
    stats=MemoryStats(**found.sizes),
    cost=None,
    text=_dumped_text(dump),
  )


def _text(compiled: jax.stages.Compiled, dump: pathlib.Path) -> str:
  """The optimized HLO."""
  try:
    return compiled.as_text() or ''
  except jax.errors.JaxRuntimeError:
    # A libtpu younger than jaxlib may write operations that jaxlib cannot read.
    return _dumped_text(dump)


def _dumped_text(dump: pathlib.Path) -> str:
  texts = dump.glob('*after_optimizations.txt')
  largest = max(texts, key=lambda p: p.stat().st_size, default=None)
  return largest.read_text() if largest else ''
