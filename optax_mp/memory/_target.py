# SPDX-License-Identifier: Apache-2.0
"""What all devices to compile for have in common."""

import dataclasses
from typing import Any


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

  @property
  def note(self) -> str:
    """A caveat for who trains on it; empty if there is none."""
    return ''
