# SPDX-License-Identifier: Apache-2.0
"""Second moments get formats without signs, whatever their fields are named."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import formats
from optax_mp import memory
from optax_mp.formats import _paths
from optax_mp.formats import _squares
import quick
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


# Fields without a negative value that no root is taken of: lengths of steps.
NO_SQUARES = {'step_sizes', 'scale', 'subgradients', 'reward'}
OTHERS = {
  'cocob': optax.contrib.cocob,
  'dadapt_adamw': optax.contrib.dadapt_adamw,
  'madgrad': optax.contrib.madgrad,
  'prodigy': optax.contrib.prodigy,
  'rprop': optax.rprop,
  'simplified_ademamix': optax.contrib.simplified_ademamix,
}
ALL = {
  **OTHERS,
  **tables.OPTIMIZERS,
  **{name: row.make for name, row in tables.PAPERS.items()},
}


def normal(seed, shape):
  x = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize('name', ALL)
def test_all_fields_without_negative_values_are_known(name):
  """kind: exact. In a field that has them, they would become NaN."""
  tx = ALL[name](1e-2)
  params = {'nu': normal(0, (16, 256)), 'mu': normal(1, (256,))}
  state = tx.init(params)
  with jax.numpy_dtype_promotion('standard'):
    update = quick.jit(tx.update)
    for i in range(3):
      gradients = {k: normal(i, x.shape) for k, x in params.items()}
      updates, state = update(gradients, state, params)
      params = optax.apply_updates(params, updates)
  leaves = jax.tree_util.tree_leaves_with_path(state)
  parts = _paths.split_paths(
    [path for path, _ in leaves], _paths.param_paths(params)
  )
  for path, leaf in leaves:
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.size < 256:
      continue
    own, _ = parts[path]
    names = set(_paths.fields(own))
    is_square = bool((leaf >= 0).all()) and not names & NO_SQUARES
    assert _squares.are_squares(own, state) == is_square, (path, leaf)


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


class TheirState(NamedTuple):
  """A state of somebody else, whose `nu` has signs."""

  nu: Any


def test_what_others_call_by_that_name_keeps_its_signs():
  theirs = optax.GradientTransformation(
    lambda params: TheirState(jax.tree.map(jnp.zeros_like, params)),
    lambda updates, state, params=None: (updates, TheirState(updates)),
  )
  format, params = formats.BlockInt(8), jnp.ones((16, 256))
  for inner in (theirs, optax.chain(optax.scale(2.0), theirs)):
    tx = optax_mp.compressed(inner, format, min_size=0)
    assert chosen(tx, params)['nu'] == str(format)
  hessians = optax.contrib.sophia(1e-3)
  tx = optax_mp.compressed(hessians, format, min_size=0)
  assert chosen(tx, params)['nu'] == str(format)


def test_a_format_by_hand_stays():
  """Squares in a format without a shared scale, or unsigned already."""
  for format in (formats.Split(8), formats.BlockInt(8, signed=False)):
    tx = optax_mp.compressed(optax.adam(1e-3), {'nu': format}, min_size=0)
    assert chosen(tx, jnp.ones((16, 256)))['nu'] == str(format)
