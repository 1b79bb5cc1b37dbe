# SPDX-License-Identifier: Apache-2.0
"""The devices that can be compiled for without owning one.

A TPU is known to its compiler by a name and a topology; for GPUs see `_gpus`.
"""

import dataclasses
import math
import os
from typing import Any

from optax_mp.memory import _gpus
from optax_mp.memory import _target

# Memory is addressed in bytes; XLA's "G" is 2^30.
_GIB = 2**30

_2D = ('1x1', '1x2', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_3D = (
  '1x1x1',
  '1x2x1',
  '2x2x1',
  '2x2x2',
  '2x2x4',
  '2x4x4',
  '4x4x4',
  '4x4x8',
  '4x8x8',
  '8x8x8',
)


@dataclasses.dataclass(frozen=True)
class Tpu(_target.Target):
  """Devices of a slice; ``shapes`` are those of a slice in chips."""

  version: str
  shapes: tuple[str, ...]
  cores: int = 1  # devices per chip
  options: tuple[tuple[str, str], ...] = ()

  def topology(self, num_devices: int) -> dict[str, Any]:
    """See `Target.topology`."""
    sizes = {_size(s) * self.cores: s for s in self.shapes}
    if num_devices == 1:
      sizes[1] = self.shapes[0]
    if num_devices not in sizes:
      raise ValueError(
        f'`mesh` must have as many devices as a slice of {self.name}; got '
        f'{num_devices}. Slices have {sorted(sizes)}.'
      )
    name = f'{self.version}:{sizes[num_devices]}'
    return {'platform': 'tpu', 'topology_name': name, **dict(self.options)}


def _size(shape: str) -> int:
  return math.prod(map(int, shape.split('x')))


def _host_memory() -> int:
  return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def _tpu(name, device, gib, version, shapes, cores=1, **options):
  # The compiler keeps some of the memory for itself: of 16 GiB, 15.75 are left.
  capacity = int(gib * _GIB)
  return Tpu(
    name,
    device,
    'tpu',
    capacity,
    version,
    shapes,
    cores,
    tuple(options.items()),
  )


# fmt: off
TARGETS: dict[str, _target.Target] = {
  target.name: target
  for target in (
    _tpu('tpu-v4', 'TPU v4', 30.75, 'v4', _3D, chip_config_name='megacore'),
    _tpu('tpu-v5e', 'TPU v5 lite', 15.75, 'v5e', _2D),
    _tpu('tpu-v5p', 'TPU v5', 95.73, 'v5p', _3D),
    _tpu('tpu-v6e', 'TPU v6 lite', 31.24, 'v6e', _2D),
    _tpu('tpu-7x', 'TPU7x', 94.74, 'tpu7x', _3D, cores=2),
    *_gpus.GPUS,
    _target.Target('cpu', 'cpu', 'cpu', _host_memory()),
  )
}
# fmt: on


def find(name: str) -> _target.Target:
  """Looks a target up.

  Args:
    name: such as 'tpu-v5e' or 'h100'.

  Returns:
    The target.

  Raises:
    ValueError: if there is none of that name.
  """
  if name not in TARGETS:
    raise ValueError(
      f'`target` must be one of {", ".join(TARGETS)}; got {name!r}.'
    )
  return TARGETS[name]
