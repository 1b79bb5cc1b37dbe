# SPDX-License-Identifier: Apache-2.0
"""Second moments get formats without signs, whatever their fields are named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import formats
from optax_mp import memory
import tables

SIGNED = [
  formats.BlockInt(8),
  formats.BlockInt(8, map='sqrt_log', rounding='stochastic'),
  formats.BlockInt(8, map='sqrt_log', scale='rank1'),
  formats.BlockInt(4, map='dynamic'),
  formats.Float8(),
  formats.ErrorFeedback(formats.BlockInt(8), formats.BlockInt(4)),
]
KEY = jax.random.key(0)
# Which fields of each optimizer are squares, and which have signs.
FIELDS = {
  'adam': ({'nu'}, {'mu'}),
  'amsgrad': ({'nu', 'nu_max'}, {'mu'}),
  'adadelta': ({'e_g', 'e_x'}, set()),
  'adagrad': ({'sum_of_squares'}, set()),
  'adan': ({'n'}, {'m', 'v', 'g'}),
  'sm3': ({'mu'}, {'nu'}),
  'sgd-momentum': (set(), {'trace'}),
}


def chosen(tx, params):
  """The format of each field, as the plan shows it."""
  leaves = memory.plan(tx, params).leaves
  return {
    field: leaf.format
    for leaf in leaves
    if leaf.format is not None
    for field in leaf.path.split('/')
  }


@pytest.mark.parametrize('format', SIGNED, ids=repr)
def test_the_twin_is_the_same_without_signs(format):
  """kind: exact. It stores squares, and the same number of bits."""
  twin = format.without_signs
  assert not twin.signed and twin.without_signs == twin
  shape = (16, 256)
  assert formats.bits_per_value(twin, shape) == formats.bits_per_value(
    format, shape
  )
  x = np.square(np.random.default_rng(0).normal(size=shape)).astype(np.float32)
  seen = twin.decode(twin.encode(jnp.asarray(x), KEY), x)
  assert (np.asarray(seen) > 0).all()


@pytest.mark.parametrize('name', FIELDS)
def test_each_field_gets_the_one_that_is_right(name):
  format = formats.BlockInt(8)
  tx = optax_mp.compressed(tables.OPTIMIZERS[name](), format, min_size=0)
  found = chosen(tx, jnp.ones((16, 256)))
  squares, others = FIELDS[name]
  assert {found[field] for field in squares} <= {str(format.without_signs)}
  assert {found[field] for field in others} <= {str(format)}


def test_a_factored_state():
  format = formats.BlockInt(8)
  inner = optax.adafactor(1e-3, min_dim_size_to_factor=4096, momentum=0.9)
  found = chosen(optax_mp.compressed(inner, format), jnp.ones((64, 128)))
  assert found['v'] == str(format.without_signs)
  assert found['ema'] == str(format)


def test_a_parameter_that_is_called_like_a_square():
  """Its momentum has signs."""
  format = formats.BlockInt(8)
  tx = optax_mp.compressed(optax.trace(0.9), format, min_size=0)
  params = optax.ScaleByAdamState(
    count=jnp.ones((8, 128)), mu=jnp.ones((8, 128)), nu=jnp.ones((8, 128))
  )
  assert set(chosen(tx, params).values()) == {str(format)}


def test_a_format_by_hand_stays():
  """Squares in a format without a shared scale, or unsigned already."""
  for format in (formats.Split(8), formats.BlockInt(8, signed=False)):
    tx = optax_mp.compressed(optax.adam(1e-3), {'nu': format}, min_size=0)
    assert chosen(tx, jnp.ones((16, 256)))['nu'] == str(format)
