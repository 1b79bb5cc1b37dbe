# SPDX-License-Identifier: Apache-2.0
"""`memory.compile_for`, for tests: skips where a compiler is not installed."""

import jax
import pytest

from optax_mp import memory

# XLA:CPU writes live ranges, and so largest buffers are told, since then.
CPU_TELLS_BUFFERS = jax.__version_info__ >= (0, 10)


def compile_for(target, *args, **kwargs):
  """Skips with the reason and the command that installs the compiler."""
  try:
    return memory.compile_for(target, *args, **kwargs)
  except ValueError as error:
    if 'has no compiler here' in str(error):
      pytest.skip(str(error))
    raise
