# SPDX-License-Identifier: Apache-2.0
"""Compiles a training step for a TPU or GPU that nobody here owns."""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
from typing import Any

import jax

from optax_mp.memory import _buffers
from optax_mp.memory import _export
from optax_mp.memory import _hlo
from optax_mp.memory import _installed
from optax_mp.memory import _targets
from optax_mp.memory import _worker
from optax_mp.memory import _xla


@functools.cache
def targets() -> tuple[str, ...]:
  """Names what :func:`compile_for` can compile for here and now.

  Depends on the extras ``tpu`` and ``gpu``, and on what the installed libtpu
  knows.

  Returns:
    Names of devices. Those of TPUs are of one device as JAX has it: a chip, of
    TPU 7x one of its two cores.

  Examples:
    >>> import optax_mp
    >>> 'cpu' in optax_mp.memory.targets()
    True
  """
  installed = [
    target
    for target in _targets.TARGETS.values()
    if not _installed.missing(target.platform)
  ]
  tpus = [t.name for t in installed if t.platform == 'tpu']
  known = _worker.ask('tpu', 'known', *tpus) if tpus else ()
  return tuple(
    t.name for t in installed if t.platform != 'tpu' or t.name in known
  )


def compile_for(
  target: str,
  fn: Callable[..., Any],
  *args: Any,
  donate_argnums: int | Sequence[int] = (),
  static_argnums: int | Sequence[int] = (),
  mesh: _export.Mesh | None = None,
) -> _xla.Compiled:
  """Compiles a step for a device that need not be here, to see what it takes.

  The compilers are the real ones, XLA's for TPUs and NVIDIA GPUs; they run on
  any Linux machine, allocate nothing and execute nothing. ``fn`` is traced and
  lowered here; for a TPU or GPU another process compiles it, which stays for
  the next call. It knows nothing of this process's ``XLA_FLAGS``, and GPU
  kernels are not autotuned: their scratch memory may differ a little.

  Args:
    target: one of :func:`targets`: 'tpu-v5e', 'h100', 'rtx-4090', 'cpu', ...
    fn: a step, jitted or not; a jitted one keeps its own donated and static
      arguments and shardings. What it asks of ``jax.default_backend()`` or
      ``jax.devices()`` it is told of this machine.
    *args: its arguments: arrays, or ``jax.ShapeDtypeStruct`` in their place;
      where it takes keywords, give a ``lambda``.
    donate_argnums: the arguments whose memory the outputs may reuse.
    static_argnums: the arguments that are no arrays.
    mesh: for several devices of one slice or node: the mesh of the arguments'
      ``NamedSharding``, of any devices or, as a ``jax.sharding.AbstractMesh``,
      of none. Arguments without sharding are replicated.

  Returns:
    A :class:`Compiled` for :func:`report`, also if the program is too large for
    the device.

  Raises:
    ValueError: if ``target`` is unknown or its compiler not installed, with the
      command that installs it; if ``mesh`` has not as many devices as a slice.
    RuntimeError: if the compiler fails for another reason than memory.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_mp
    >>> x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    >>> step = lambda x: 2 * x
    >>> compiled = optax_mp.memory.compile_for('cpu', step, x, donate_argnums=0)
    >>> optax_mp.memory.report(compiled).peak_bytes == 4 * 1024**2
    True
  """
  found = _targets.find(target)
  if missing := _installed.missing(found.platform):
    raise ValueError(f'`target` {target!r} has no compiler here: {missing}')
  num_devices = mesh.size if mesh is not None else 1
  if num_devices < 1:
    raise ValueError(f'`mesh` must have a device at least; got {mesh}.')
  found.topology(num_devices)
  fn = _export.jitted(fn, donate_argnums, static_argnums)
  args = jax.tree.map(_export.shape, args)
  with _in(mesh):
    traced = fn.trace(*args)
    exported = _export.lower(fn, args, found.platform)
  if exported.nr_devices not in (1, num_devices):
    raise ValueError(
      f'`mesh` must be the one that shards the arguments, of '
      f'{exported.nr_devices} devices; got {mesh}.'
    )
  info = jax.tree.leaves(traced.args_info)
  donated = tuple(argument.donated for argument in info)
  axes = _axes(mesh) if mesh is not None else ()
  job = _xla.Job(found, num_devices, axes, donated)
  if found.platform == 'cpu':
    compiled = _xla.compile_exported(exported, job)
  else:
    program = _export.serialize(exported)
    compiled = _worker.ask(found.platform, 'compile', program, job)
  paths = _export.paths(traced)
  return _named(compiled, [paths[i] for i in exported.module_kept_var_idx])


def _axes(mesh: _export.Mesh) -> tuple[tuple[str, int, Any], ...]:
  """Names, sizes and types of a mesh's axes."""
  return tuple(
    zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
  )


def _in(mesh: _export.Mesh | None) -> Any:
  """The context in which specs without a mesh mean this one."""
  if mesh is None:
    return contextlib.nullcontext()
  return jax.sharding.use_abstract_mesh(_export.abstract(mesh))


def _named(compiled: _xla.Compiled, paths: list[str]) -> _xla.Compiled:
  """Calls buffers what the user called them."""
  operations = _hlo.Program(compiled.text).op_names()

  def rename(buffer: _buffers.Buffer) -> _buffers.Buffer:
    name = operations.get(buffer.name) or buffer.name
    if buffer.kind == 'argument':
      name = paths[int(buffer.name.split()[-1])]
    return dataclasses.replace(buffer, name=name)

  buffers = tuple(map(rename, compiled.buffers))
  return dataclasses.replace(compiled, buffers=buffers)
