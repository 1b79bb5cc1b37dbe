# SPDX-License-Identifier: Apache-2.0
"""Where results go, and the conditions they were obtained under."""

import importlib.metadata
import json
import os
import pathlib
import platform
import sys
from typing import Any

import jax
from matplotlib import figure

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'examples'))

import files

FOLDER = pathlib.Path(__file__).parent / 'results'
_PACKAGES = (
  'jax',
  'jaxlib',
  'optax',
  'flax',
  'libtpu',
  'jax-cuda12-plugin',
  'jax-cuda13-plugin',
)


def conditions() -> dict[str, Any]:
  """Machine, device and versions, as every JSON has them."""
  versions = {}
  for package in _PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  return {
    'processor': platform.machine(),
    'cores': os.cpu_count(),
    'device': jax.devices()[0].device_kind,
    'python': platform.python_version(),
    'versions': versions,
  }


def save(
  name: str,
  result: dict[str, Any],
  drawn: figure.Figure,
  folder: pathlib.Path = FOLDER,
) -> None:
  """Writes NAME.json, with the conditions, and NAME.png.

  Args:
    name: of the benchmark.
    result: numbers, strings, lists, dictionaries.
    drawn: the figure.
    folder: where to.
  """
  folder.mkdir(parents=True, exist_ok=True)
  told = {'conditions': conditions()} | result
  # Whole or not at all: some benchmarks go on from what they have saved.
  text = json.dumps(told, indent=1) + '\n'
  files.write_text(folder / f'{name}.json', text)
  drawn.savefig(folder / f'{name}.png', dpi=120)


def load(name: str, folder: pathlib.Path = FOLDER) -> dict[str, Any]:
  """Reads a result."""
  return files.read_json(
    folder / f'{name}.json', 'Remove it and run the benchmark again.'
  )
