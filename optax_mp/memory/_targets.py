# SPDX-License-Identifier: Apache-2.0
"""The devices that can be compiled for without owning one.

A TPU is known to its compiler by a name and a topology. The compiler for
NVIDIA GPUs wants a description: a `GpuTargetConfigProto` in text form (openxla,
`xla/stream_executor/device_description.proto`), with the vendor's figures.
"""

import dataclasses
import math
import os
from typing import Any

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
class Target:
  """A kind of device, as JAX sees it: of a TPU chip with two cores, a core."""

  name: str  # for `compile_for`
  device: str  # JAX's `device_kind`
  platform: str  # 'tpu', 'cuda' or 'cpu'
  capacity_bytes: int  # of one device, what a program may use

  def topology(self, num_devices: int) -> dict[str, Any]:
    """Arguments of `topologies.get_topology_desc` for so many devices.

    Args:
      num_devices: of one slice, or of one node.

    Returns:
      Keyword arguments.

    Raises:
      ValueError: if no slice has so many.
    """
    del num_devices
    return {}

  @property
  def compiler_options(self) -> dict[str, Any]:
    """Options for XLA."""
    return {}


@dataclasses.dataclass(frozen=True)
class Tpu(Target):
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


@dataclasses.dataclass(frozen=True)
class Gpu(Target):
  """GPUs of one node, with what the compiler asks about one of them."""

  compute_capability: int
  cores: int  # streaming multiprocessors
  fpus_per_core: int
  shared_memory: int  # bytes a core; a block may have 1 KiB less
  l2_cache_size: int  # bytes
  clock_ghz: float
  bandwidth: float  # bytes per second

  def topology(self, num_devices: int) -> dict[str, Any]:
    """See `Target.topology`."""
    if num_devices > 8:
      raise ValueError(
        f'`mesh` must lie in one node of {self.name}, of 8 devices; got '
        f'{num_devices}.'
      )
    return {
      'platform': 'cuda',
      'topology_name': self.name,
      'target_config': self._config(),
      'topology': f'1x1x{num_devices}',
    }

  @property
  def compiler_options(self) -> dict[str, Any]:
    """Without autotuning, which measures on the device."""
    return {'xla_gpu_autotune_level': 0}

  def _config(self) -> str:
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  threads_per_core_limit: 2048 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {self.shared_memory - 1024}
  shared_memory_per_core: {self.shared_memory}
  core_count: {self.cores} fpus_per_core: {self.fpus_per_core}
  memory_bandwidth: {int(self.bandwidth)} l2_cache_size: {self.l2_cache_size}
  clock_rate_ghz: {self.clock_ghz} device_memory_size: {self.capacity_bytes}
  cuda_compute_capability {{ major: {self.compute_capability} minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {self.compute_capability}.0"
  device_address_bits: 64 driver_version: "12.8.0" runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.device}"
"""


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


def _a100(name: str, device: str, capacity: int, bandwidth: float) -> Gpu:
  return Gpu(
    name, device, 'cuda', capacity, 8, 108, 64, 167_936, 40 * 2**20, 1.41,
    bandwidth,
  )  # fmt: skip


def _hopper(name: str, device: str, capacity: int, bandwidth: float) -> Gpu:
  return Gpu(
    name, device, 'cuda', capacity, 9, 132, 128, 233_472, 50 * 2**20, 1.98,
    bandwidth,
  )  # fmt: skip


# fmt: off
TARGETS: dict[str, Target] = {
  target.name: target
  for target in (
    _tpu('tpu-v4', 'TPU v4', 30.75, 'v4', _3D, chip_config_name='megacore'),
    _tpu('tpu-v5e', 'TPU v5 lite', 15.75, 'v5e', _2D),
    _tpu('tpu-v5p', 'TPU v5', 95.73, 'v5p', _3D),
    _tpu('tpu-v6e', 'TPU v6 lite', 31.24, 'v6e', _2D),
    _tpu('tpu-7x', 'TPU7x', 94.74, 'tpu7x', _3D, cores=2),
    _a100('a100-40gb', 'NVIDIA A100-SXM4-40GB', 42_331_013_120, 1.5552e12),
    _a100('a100-80gb', 'NVIDIA A100-SXM4-80GB', 85_100_068_864, 2.03904e12),
    _hopper('h100', 'NVIDIA H100 80GB HBM3', 84_942_979_072, 3.35232e12),
    _hopper('h200', 'NVIDIA H200', 151_397_597_184, 4.8e12),
    Target('cpu', 'cpu', 'cpu', _host_memory()),
  )
}
# fmt: on


def find(name: str) -> Target:
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
