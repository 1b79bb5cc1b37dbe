# SPDX-License-Identifier: Apache-2.0
"""Writes the table of docs/clients.md: `python tests/clients/table.py`.

It trains every client with every transformation, compiled as for its users, and
in float32 over six seeds. Minutes on a CPU; google-tunix must be installed.
"""

import importlib.metadata
import os
import pathlib
import platform
import re
import sys

# Before JAX starts: Linen's program is for eight devices.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
TESTS = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from clients import equinox_mlp  # noqa: E402
from clients import haiku_cnn  # noqa: E402
from clients import linen_lm  # noqa: E402
from clients import nnx_lm  # noqa: E402
from clients import runs  # noqa: E402

PAGE = TESTS.parent / 'docs' / 'clients.md'
SEEDS = range(6)
PACKAGES = ('jax', 'flax', 'optax', 'equinox', 'dm-haiku', 'google-tunix')


def clients():
  """Columns of the table: a client's program."""
  from clients import tunix_peft

  return {
    'Equinox': equinox_mlp.train,
    'Haiku': haiku_cnn.train,
    'NNX': nnx_lm.train,
    'Linen, 8 devices': linen_lm.train,
    'PeftTrainer, LoRA': tunix_peft.train,
  }


def spread(train):
  """The standard deviation of AdamW's final loss in float32 over seeds."""
  make = runs.FLOAT32['adamw']
  return np.std(
    [runs.final(train(make, jnp.float32, seed=seed)[0]) for seed in SEEDS]
  )


def line(*cells):
  return '| ' + ' | '.join(cells) + ' |'


def cell(train, row):
  """Ours and, after the arrow's origin, the client's own float32."""
  ours = runs.final(train(row.ours, runs.BF16)[0])
  return f'{runs.float32(train, row.theirs):.3f} → {ours:.3f}'


def table(columns):
  yield line('transformation', 'replaces', *columns)
  yield line(*['---'] * (2 + len(columns)))
  for name, row in runs.OURS.items():
    cells = [cell(train, row) for train in columns.values()]
    print(name, *cells, flush=True)
    yield line(f'`{name}`', f'`{row.theirs}`', *cells)
  spreads = [f'± {spread(train):.3f}' for train in columns.values()]
  yield line('another seed', '`adamw`', *spreads)


def conditions():
  versions = [f'{p} {importlib.metadata.version(p)}' for p in PACKAGES]
  return f'Python {platform.python_version()}, {", ".join(versions)}; CPU.'


def filled(page, text):
  """The page, with the text between the marks of the table."""
  begin, end = '<!-- begin table -->\n', '<!-- end table -->'
  pattern = f'({re.escape(begin)}).*({re.escape(end)})'
  return re.sub(pattern, lambda m: m[1] + text + m[2], page, flags=re.S)


def main():
  text = '\n'.join([*table(clients()), '', conditions(), ''])
  PAGE.write_text(filled(PAGE.read_text(), text))


if __name__ == '__main__':
  main()
