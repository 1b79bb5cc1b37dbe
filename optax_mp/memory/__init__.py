# SPDX-License-Identifier: Apache-2.0
"""How much memory training takes: from shapes, and from the real compilers."""

from optax_mp.memory import gpt as gpt
from optax_mp.memory._buffers import Buffer as Buffer
from optax_mp.memory._compile import compile_for as compile_for
from optax_mp.memory._compile import targets as targets
from optax_mp.memory._plan import Plan as Plan
from optax_mp.memory._plan import Row as Row
from optax_mp.memory._plan import plan as plan
from optax_mp.memory._report import Report as Report
from optax_mp.memory._report import report as report
from optax_mp.memory._xla import Compiled as Compiled

__all__ = (
  'Buffer',
  'Compiled',
  'Plan',
  'Report',
  'Row',
  'compile_for',
  'gpt',
  'plan',
  'report',
  'targets',
)
