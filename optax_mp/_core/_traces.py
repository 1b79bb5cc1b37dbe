# SPDX-License-Identifier: Apache-2.0
"""Tells in which of JAX's traces code runs."""

from typing import Any

import jax
from jax.extend import core


def current() -> Any:
  """The trace in which the caller runs, to be compared with another one."""
  # JAX 0.9 has this function in `jax.core` alone; later versions deprecate it
  # there.
  name = 'get_opaque_trace_state'
  module = core if hasattr(core, name) else getattr(jax, 'core')  # noqa: B009
  return getattr(module, name)(convention='nnx')
