# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's GPUs, as their compiler asks about them.

It wants a description: a `GpuTargetConfigProto` in text form (openxla,
`xla/stream_executor/device_description.proto`), with the vendor's figures.
"""

import dataclasses
from typing import Any

from optax_mp.memory import _target

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Gpu(_target.Target):
  """GPUs of one node, with what the compiler asks about one of them."""

  compute_capability: tuple[int, int]  # major and minor
  cores: int  # streaming multiprocessors
  fpus_per_core: int
  threads_per_core: int
  shared_memory: int  # bytes a core
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

  @property
  def note(self) -> str:
    """See `Target.note`."""
    if self.compute_capability >= (8, 0):
      return ''
    return (
      f'{self.device} has no units for bfloat16: XLA converts both operands of '
      'a product to float32, which is slow and takes memory. Compute in '
      'float16 there, with a scaled loss (`examples/float16_loss_scale.py`).'
    )

  def _config(self) -> str:
    major, minor = self.compute_capability
    reserved = 1024 if major >= 8 else 0  # of a core's, not for a block
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  threads_per_core_limit: {self.threads_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {self.shared_memory - reserved}
  shared_memory_per_core: {self.shared_memory}
  core_count: {self.cores} fpus_per_core: {self.fpus_per_core}
  memory_bandwidth: {int(self.bandwidth)} l2_cache_size: {self.l2_cache_size}
  clock_rate_ghz: {self.clock_ghz} device_memory_size: {self.capacity_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}"
  device_address_bits: 64 driver_version: "12.8.0" runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.device}"
"""


def _gpu(
  name: str,
  device: str,
  capacity: int,
  generation: tuple[Any, ...],
  cores: int,
  l2_cache_size: int,
  clock_ghz: float,
  gigabytes_per_second: float,
) -> Gpu:
  """A row of the table below."""
  capability, fpus, threads, shared_memory = generation
  return Gpu(
    name, device, 'cuda', capacity, capability, cores, fpus, threads,
    shared_memory, l2_cache_size, clock_ghz, gigabytes_per_second * 1e9,
  )  # fmt: skip


# Compute capability; of a streaming multiprocessor: arithmetic units, threads,
# bytes of shared memory (NVIDIA's "CUDA C++ Programming Guide", the appendix on
# compute capabilities; its tuning guides have the arithmetic units).
_TURING = (7, 5), 64, 1024, 64 * 1024
_AMPERE = (8, 0), 64, 2048, 164 * 1024
_GAMING_AMPERE = (8, 6), 128, 1536, 100 * 1024
_ADA = (8, 9), 128, 1536, 100 * 1024
_HOPPER = (9, 0), 128, 2048, 228 * 1024
_BLACKWELL = (10, 0), 128, 2048, 228 * 1024
_GAMING_BLACKWELL = (12, 0), 128, 1536, 100 * 1024

# fmt: off
GPUS = (
  # Memory is what CUDA says that there is, less than the vendor's round figure
  # where some of it corrects errors; multiprocessors, level-2 cache, boost
  # clock and bandwidth. A100, H100, H200 and B200: openxla,
  # `xla/backends/gpu/target_config/specs/`.
  _gpu('a100-40gb', 'NVIDIA A100-SXM4-40GB', 42_331_013_120, _AMPERE,
       108, 40 * _MIB, 1.41, 1555.2),
  _gpu('a100-80gb', 'NVIDIA A100-SXM4-80GB', 85_100_068_864, _AMPERE,
       108, 40 * _MIB, 1.41, 2039.04),
  _gpu('h100', 'NVIDIA H100 80GB HBM3', 84_942_979_072, _HOPPER,
       132, 50 * _MIB, 1.98, 3352.32),
  _gpu('h200', 'NVIDIA H200', 151_397_597_184, _HOPPER,
       132, 50 * _MIB, 1.98, 4800),
  _gpu('b200', 'NVIDIA B200', 191_514_411_008, _BLACKWELL,
       148, 132_644_864, 1.965, 7672.32),
  # The others: NVIDIA's data sheets (T4: DS-09256; L4; A10G: Amazon's EC2 G5)
  # and white papers of the GeForce RTX (GA102, AD102 and Blackwell); memory as
  # PyTorch's `get_device_properties` told users of each.
  _gpu('t4', 'Tesla T4', 15_095 * _MIB, _TURING, 40, 4 * _MIB, 1.59, 320),
  _gpu('l4', 'NVIDIA L4', 22_478 * _MIB, _ADA, 58, 48 * _MIB, 2.04, 300),
  _gpu('a10g', 'NVIDIA A10G', 22_587 * _MIB, _GAMING_AMPERE,
       80, 6 * _MIB, 1.71, 600),
  _gpu('rtx-3090', 'NVIDIA GeForce RTX 3090', 24_259 * _MIB, _GAMING_AMPERE,
       82, 6 * _MIB, 1.695, 936),
  _gpu('rtx-4090', 'NVIDIA GeForce RTX 4090', 24_217 * _MIB, _ADA,
       128, 72 * _MIB, 2.52, 1008),
  _gpu('rtx-5090', 'NVIDIA GeForce RTX 5090', 32_120 * _MIB, _GAMING_BLACKWELL,
       170, 96 * _MIB, 2.407, 1792),
)
# fmt: on
