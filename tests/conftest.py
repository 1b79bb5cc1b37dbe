# SPDX-License-Identifier: Apache-2.0
"""Every test runs on eight CPU devices; a warning is an error.

With `TEST_PLATFORM=cuda` (or tpu) they run on what is there; those that need
eight devices are skipped.
"""

from importlib import metadata
import os
import platform
import zlib

os.environ['JAX_PLATFORMS'] = os.environ.get('TEST_PLATFORM', 'cpu')
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'

import jax  # noqa: E402, which reads them
from jax.sharding import AxisType  # noqa: E402
import pytest  # noqa: E402

import quick  # noqa: E402

_SHOWN = (
  *('jax', 'jaxlib', 'optax', 'flax', 'chex', 'orbax-checkpoint'),
  *('equinox', 'dm-haiku', 'google-tunix', 'libtpu', 'jax-cuda12-plugin'),
)


def pytest_addoption(parser):
  parser.addoption(
    '--part',
    default='1/1',
    metavar='K/N',
    help='the K-th of N parts of the tests, each with some of every file',
  )


def pytest_collection_modifyitems(config, items):
  part, parts = map(int, config.getoption('part').split('/'))
  others = []
  for item in [*items]:
    # By name, so that a new test moves no other one to another part.
    if zlib.crc32(item.nodeid.encode()) % parts != part - 1:
      items.remove(item)
      others.append(item)
  config.hook.pytest_deselected(items=others)


def pytest_terminal_summary(terminalreporter):
  """The versions that a run is of; a header would not show with `-q`."""
  found = {x.name: x.version for x in metadata.distributions()}
  shown = (f'{name} {found[name]}' for name in _SHOWN if name in found)
  terminalreporter.write_line(
    f'python {platform.python_version()}, {", ".join(shown)}'
  )


@pytest.fixture
def strict():
  """No dtype and no rank is promoted by accident."""
  with (
    jax.numpy_dtype_promotion('strict'),
    jax.numpy_rank_promotion('raise'),
  ):
    yield


@pytest.fixture
def quickly():
  """What is tested says `.compile()` itself, and does so in a hurry."""
  with quick.ahead():
    yield


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=str)
def mesh(request):
  """All devices along one axis, of either type, set."""
  if jax.device_count() < 8:
    pytest.skip('needs 8 devices')
  mesh = jax.make_mesh((8,), ('d',), axis_types=(request.param,))
  with jax.set_mesh(mesh):
    yield mesh
