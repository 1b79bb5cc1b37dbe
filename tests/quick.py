# SPDX-License-Identifier: Apache-2.0
"""`jax.jit` for tests whose programs compile for longer than they run.

XLA does with them what it always does, but writes machine code in a hurry: in a
quarter of the time. So it is for claims of what a program computes up to
rounding, of what it traces and of two runs of one program. Claims that hold to
the last bit between two programs want the machine code that everybody gets.
"""

import contextlib
import functools

import jax
import pytest


def _known(option, value):
  """Whether this XLA takes the option: names come and go with its versions."""
  try:
    jax.jit(lambda: 0, compiler_options={option: value}).lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if 'No such compile option' not in str(error):
      raise
    return False
  return True


_WANTED = {
  'xla_backend_optimization_level': 0,
  'xla_cpu_use_fusion_emitters': False,  # gone in the XLA of JAX 0.12
}
OPTIONS = {name: x for name, x in _WANTED.items() if _known(name, x)}
jit = functools.partial(jax.jit, compiler_options=OPTIONS)
_compile = functools.partialmethod(
  jax.stages.Lowered.compile, compiler_options=OPTIONS
)


@contextlib.contextmanager
def ahead():
  """The same for what others lower and compile."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax.stages.Lowered, 'compile', _compile)
    yield
