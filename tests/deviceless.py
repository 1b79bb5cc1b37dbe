# SPDX-License-Identifier: Apache-2.0
"""Compiles for accelerators that this machine does not have.

The compilers for TPUs and NVIDIA GPUs come as wheels (the extras `tpu` and
`gpu`) and need a description of the device, not the device.
"""

import importlib.util
import os

import jax
import pytest

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0" device_address_bits: 64
  driver_version: "12.8.0" runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
TPU = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


def compile_for(target, function, *args, donate_argnums=()):
  """Compiles ``function`` for 'h100' or 'tpu-v5e', from arrays or their shapes.

  Skips the test where the compiler is not installed.
  """
  from jax.experimental import topologies

  wheel = {'h100': 'jax_cuda12_plugin', 'tpu-v5e': 'libtpu'}[target]
  if importlib.util.find_spec(wheel) is None:
    extra = {'h100': 'gpu', 'tpu-v5e': 'tpu'}[target]
    pytest.skip(f"no compiler: pip install 'optax_mp[{extra}]'")
  options = None
  if target == 'h100':
    platform, options = 'cuda', {'xla_gpu_autotune_level': 0}
    topology = topologies.get_topology_desc(
      'x', 'cuda', target_config=H100, topology='1x1x1'
    )
  else:
    platform = 'tpu'
    os.environ.update(TPU)
    topology = topologies.get_topology_desc(
      platform='tpu', topology_name='v5e:2x2'
    )
  device = jax.sharding.SingleDeviceSharding(topology.devices[0])
  args = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), args
  )
  traced = jax.jit(function, donate_argnums=donate_argnums).trace(*args)
  lowered = traced.lower(lowering_platforms=(platform,))
  return lowered.compile(compiler_options=options)
