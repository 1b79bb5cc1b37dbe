# SPDX-License-Identifier: Apache-2.0
"""What a compiled program needs: bytes, and whether they fit."""

import dataclasses
from typing import Any

import jax

from optax_mp.memory import _buffers
from optax_mp.memory import _hlo
from optax_mp.memory import _table
from optax_mp.memory import _targets
from optax_mp.memory import _traffic
from optax_mp.memory import _xla

_LARGEST = 10


@dataclasses.dataclass(frozen=True)
class Report:
  """What a program needs of each device, in bytes; prints as tables.

  ``jax_debug_nans`` switches donation off: then ``alias_bytes`` is 0.
  """

  device: str  # JAX's `device_kind`
  num_devices: int
  argument_bytes: int
  output_bytes: int
  alias_bytes: int  # outputs that reuse the memory of a donated argument
  temporary_bytes: int
  generated_code_bytes: int
  peak_bytes: int  # arguments + outputs - aliased + temporaries + code
  capacity_bytes: int | None  # None if the device does not tell
  fits: bool | None
  bytes_moved: int  # from and to memory in one run, from the optimized HLO
  unknown_loops: int  # whose trips depend on data: counted as one in it
  bytes_accessed: int | None  # by XLA's cost model: of caches too; GPUs: None
  largest: tuple[_buffers.Buffer, ...]  # ten at the peak; empty if not told

  @property
  def share(self) -> float | None:
    """Of the capacity; of a GPU what JAX's allocator must at least be given."""
    return (
      self.peak_bytes / self.capacity_bytes if self.capacity_bytes else None
    )

  def to_dict(self) -> dict[str, Any]:
    """Numbers, strings and lists, for JSON."""
    return dataclasses.asdict(self) | {
      'largest': [dataclasses.asdict(buffer) for buffer in self.largest]
    }

  def __str__(self) -> str:
    sizes = (
      'argument', 'output', 'alias', 'temporary', 'generated_code', 'peak',
      'capacity',
    )  # fmt: skip
    cells: list[tuple[Any, ...]] = [
      (name.replace('_', ' '), getattr(self, f'{name}_bytes')) for name in sizes
    ]
    loops = f', {self.unknown_loops} loops once' if self.unknown_loops else ''
    cells.append((f'moved in one run{loops}', self.bytes_moved))
    title = f'bytes on {self.num_devices} x {self.device}, each'
    fits = {True: 'fits', False: 'does not fit', None: 'capacity unknown'}
    share = f', {self.share:.0%} of the capacity' if self.capacity_bytes else ''
    parts = [_table.table((title, ''), cells), fits[self.fits] + share]
    if self.largest:
      header = ('largest at the peak', 'shape', 'name', 'bytes')
      parts.append(
        _table.table(
          header, [(b.kind, b.shape, b.name, b.bytes) for b in self.largest]
        )
      )
    return '\n'.join(parts)


def report(compiled: jax.stages.Compiled | _xla.Compiled) -> Report:
  """Reads how much memory a compiled program needs, and of what.

  ``peak_bytes`` is what the program occupies while it runs: arguments, outputs
  that do not reuse one, temporaries as the compiler has packed them, and code.
  The capacity is, of a device that is here, what JAX's allocator has. Else, of
  a TPU what a program may use, and of a GPU all its memory, of which the driver
  takes some and JAX's allocator three quarters, unless
  ``XLA_PYTHON_CLIENT_MEM_FRACTION`` says otherwise; of a CPU the machine's.

  Args:
    compiled: of :func:`compile_for`, or of
      ``jax.jit(step, donate_argnums=...).lower(...).compile()``, which does not
      tell the largest buffers.

  Returns:
    A :class:`Report`.

  Raises:
    ValueError: if the backend does not tell.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_mp
    >>> double = jax.jit(lambda x: 2 * x, donate_argnums=0)
    >>> compiled = double.lower(jnp.ones((256, 256))).compile()
    >>> report = optax_mp.memory.report(compiled)
    >>> report.argument_bytes, report.alias_bytes, report.temporary_bytes
    (262144, 262144, 0)
    >>> report.bytes_moved  # 256 * 256 float32 read, as many written
    524288
  """
  stats = compiled.memory_analysis()
  if stats is None:
    raise ValueError(
      f'`compiled` does not tell its memory: got {compiled!r} of a backend '
      'without `memory_analysis`. Compile for the CPU, a GPU or a TPU.'
    )
  sizes = {
    'argument_bytes': stats.argument_size_in_bytes,
    'output_bytes': stats.output_size_in_bytes,
    'alias_bytes': stats.alias_size_in_bytes,
    'temporary_bytes': stats.temp_size_in_bytes,
    'generated_code_bytes': stats.generated_code_size_in_bytes,
  }
  peak = sum(sizes.values()) - 2 * sizes['alias_bytes']
  device, num_devices, capacity = _device(compiled)
  cost = compiled.cost_analysis() or {}
  accessed = cost.get('bytes accessed')
  traffic = _traffic.Traffic(_hlo.Program(compiled.as_text() or ''))
  return Report(
    device=device,
    num_devices=num_devices,
    **sizes,
    peak_bytes=peak,
    capacity_bytes=capacity,
    fits=None if capacity is None else _fits(compiled, peak, capacity),
    bytes_moved=traffic.bytes,
    unknown_loops=traffic.unknown_loops,
    bytes_accessed=None if accessed is None else int(accessed),
    largest=getattr(compiled, 'buffers', ())[:_LARGEST],
  )


def _fits(compiled: Any, peak: int, capacity: int) -> bool:
  if isinstance(compiled, _xla.Compiled) and compiled.target.platform == 'tpu':
    return not compiled.refusal  # its compiler knows better than a sum
  return peak <= capacity


def _device(compiled: Any) -> tuple[str, int, int | None]:
  """Kind, number and capacity of the devices of a program."""
  if isinstance(compiled, _xla.Compiled):
    target = compiled.target
    return compiled.device, compiled.num_devices, target.capacity_bytes
  shardings = jax.tree.leaves(compiled.input_shardings)
  shardings += jax.tree.leaves(compiled.output_shardings)
  devices = list(shardings[0].device_set) if shardings else jax.devices()[:1]
  kind = devices[0].device_kind
  try:
    limit = (devices[0].memory_stats() or {}).get('bytes_limit')
  except jax.errors.JaxRuntimeError:  # the device is not here
    limit = None
  for target in _targets.TARGETS.values():
    if limit is None and kind == target.device:
      limit = target.capacity_bytes
  return kind, len(devices), limit
