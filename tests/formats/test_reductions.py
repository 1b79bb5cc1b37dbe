# SPDX-License-Identifier: Apache-2.0
"""The programs of all platforms give the same scales: GPUs have their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compilers import compile_for
from optax_mp.formats import _reductions
import tables

USUAL = np.random.default_rng(0).uniform(0.5, 2, (16, 256)).astype(np.float32)
SPECIAL = {
  'usual': (),
  'infinity': (np.inf,),
  'nan': (np.nan,),
  'huge': (1e30,),
  'all': (np.inf, np.nan, 1e30, 0.0, -0.0, 1e-40),
}
FILLED = {'zeros': 0.0, 'subnormals': 1e-40, 'huge alone': 1e30}


def arrays():
  for name, values in SPECIAL.items():
    x = USUAL.copy()
    for i, value in enumerate(values):  # all in one block
      x[3, 5 + 20 * i] = value
    yield name, x
  for name, value in FILLED.items():
    x = np.full_like(USUAL, value)
    x[5, 7] = -0.0
    yield name, x


def decoded(format, x):
  key = jax.random.key(0)
  return np.asarray(format.decode(format.encode(x, key), x))


SHARING = [name for name, row in tables.FORMATS.items() if row.shares]


@pytest.mark.parametrize('name', SHARING)
def test_one_reduction_or_two(name, monkeypatch):
  """kind: exact; sums, which only factors have, to a rounding of each term."""
  format = tables.FORMATS[name].format
  for kind, x in arrays():
    seen = {}
    for chosen in ('one', 'two', 'tpu'):
      monkeypatch.setattr(
        _reductions, 'by_size', lambda x, c=chosen, **programs: programs[c](x)
      )
      seen[chosen] = decoded(format, x)
    for chosen in ('one', 'tpu'):
      np.testing.assert_allclose(
        seen[chosen],
        seen['two'],
        rtol=2**-14 if tables.FORMATS[name].shares == 'matrix' else 0,
        err_msg=f'{kind}, {chosen}',
      )


@pytest.mark.parametrize('target', ['cpu', 'h100', 'tpu-v5e'])
@pytest.mark.parametrize('name', SHARING)
def test_scales_of_values_on_several_devices(name, target):
  """Collectives on CPUs and GPUs know sums, products, maxima and minima alone.

  The leaf is one that a GPU reduces once, and no block is on one device.
  """
  mesh = jax.make_mesh((8,), ('x',), (jax.sharding.AxisType.Auto,))
  cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'x'))
  x = jax.ShapeDtypeStruct((4096, 200), jnp.float32, sharding=cut)
  assert x.size >= _reductions.FEW
  format = tables.FORMATS[name].format

  def encode(x):
    return format.encode(x, jax.random.key(0))

  compile_for(target, encode, x, mesh=mesh)
