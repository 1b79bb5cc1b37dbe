# SPDX-License-Identifier: Apache-2.0
"""The programs of all platforms give the same scales: GPUs have their own."""

import jax
import numpy as np
import pytest

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
    for i, value in enumerate(values):
      x[3 + i, 5 + 40 * i] = value
    yield name, x
  for name, value in FILLED.items():
    x = np.full_like(USUAL, value)
    x[5, 7] = -0.0
    yield name, x


def decoded(format, x):
  key = jax.random.key(0)
  return np.asarray(format.decode(format.encode(x, key), x))


@pytest.mark.parametrize(
  'name', [name for name, row in tables.FORMATS.items() if row.shares]
)
def test_one_reduction_or_two(name, monkeypatch):
  """kind: exact; sums, which only factors have, to a rounding of each term."""
  format = tables.FORMATS[name].format
  for kind, x in arrays():
    seen = {}
    for chosen in ('one', 'two', 'others'):
      monkeypatch.setattr(
        _reductions, 'by_size', lambda x, c=chosen, **programs: programs[c](x)
      )
      seen[chosen] = decoded(format, x)
    for chosen in ('one', 'two'):
      np.testing.assert_allclose(
        seen[chosen],
        seen['others'],
        rtol=2**-14 if tables.FORMATS[name].shares == 'matrix' else 0,
        err_msg=f'{kind}, {chosen}',
      )
