# SPDX-License-Identifier: Apache-2.0
"""In which of JAX's traces a piece of code runs."""

from typing import Any

import jax
from jax.extend import core


def current() -> Any:
  """What is traced now, to be compared with what is traced elsewhere."""
  # JAX 0.9 has it in `jax.core` alone, where later ones deprecate it.
  name = 'get_opaque_trace_state'
  module = core if hasattr(core, name) else getattr(jax, 'core')  # noqa: B009
  return getattr(module, name)(convention='nnx')
