# SPDX-License-Identifier: Apache-2.0
"""Any tree that Optax trains is trained, or refused by name.

A thousand trees, drawn anew for each kind of transformation and the same in
each run. They are traced, not run: no tolerance is in it, all claims are exact.
"""

import re

from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import seed
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import optax
import pytest

import odd_trees
import optax_mp
from optax_mp import formats
import tables

pytestmark = pytest.mark.filterwarnings('ignore:`compensated` does nothing')

# What this library refuses where Optax does not, each with its reason.
REFUSED = {
  r'`rule` matches no leaf': 'there is nothing to compress',
  r'`rule` names the state fields': 'a field has no float array in this tree',
}

INNER = {
  'adam': lambda: optax.adam(1e-3),
  'adamw': lambda: optax.adamw(1e-3, weight_decay=1e-2),
  'sgd': lambda: optax.sgd(0.1, momentum=0.9),
  'lion': lambda: optax.lion(1e-3),
  'adafactor': lambda: optax.adafactor(1e-3, min_dim_size_to_factor=8),
  'muon': lambda: optax.contrib.muon(1e-3),
}


def _by_path(path, leaf):
  if '/nu/' in f'/{path}/' and len(leaf.shape) > 1:
    return formats.Factored()
  return formats.BlockInt(8) if leaf.size != 256 else None


RULES = {
  'split': formats.Split(8),
  'bfloat16': formats.BFloat16('stochastic'),
  'int8': formats.BlockInt(8),
  'int4': formats.BlockInt(4, map='softsign', rounding='stochastic'),
  'rank1': formats.BlockInt(8, scale='rank1'),
  'fp8': formats.Float8(),
  'feedback': formats.ErrorFeedback(formats.BlockInt(8), formats.BlockInt(4)),
  'by_path': _by_path,
  'by_field': {
    'mu': formats.BlockInt(8),
    'nu': formats.BlockInt(8, signed=False),
  },
}
_BASES = {
  'sgdm_bf16': 'sgd',
  'sgdm_8bit': 'sgd',
  'lion_bf16': 'lion',
  'lion_8bit': 'lion',
  'muon_8bit': 'muon',
}

MIN_SIZES = st.sampled_from((0, 0, 4096))
BITS = st.sampled_from((16, 8, 0))


@st.composite
def recipes(draw, name):
  recipe = tables.RECIPES[name].recipe
  size = {} if name.endswith('bf16') else {'min_size': draw(MIN_SIZES)}
  tx = recipe(1e-3, residual_bits=draw(BITS), **size)
  return tx, INNER[_BASES.get(name, 'adamw')]()


@st.composite
def papers(draw, name):
  tx = tables.PAPERS[name].make(1e-3)
  if draw(st.booleans()):
    tx = optax_mp.compensated(tx, draw(BITS))
  return tx, INNER['adamw']()


@st.composite
def wrapped(draw, name):
  freeze = odd_trees.frozen if draw(st.booleans()) else lambda tx: tx
  rules = [k for k in RULES if k != 'by_field' or name in ('adam', 'adamw')]
  rule, size = RULES[draw(st.sampled_from(rules))], draw(MIN_SIZES)
  tx = optax_mp.compressed(freeze(INNER[name]()), rule, min_size=size)
  if draw(st.booleans()):
    tx = optax_mp.compensated(tx, draw(BITS))
  return tx, freeze(INNER[name]())


@st.composite
def compensated(draw, name):
  freeze = odd_trees.frozen if draw(st.booleans()) else lambda tx: tx
  tx = optax_mp.compensated(freeze(INNER[name]()), draw(BITS))
  return tx, freeze(INNER[name]())


KINDS = {
  **{name: recipes(name) for name in tables.RECIPES},
  **{
    name: papers(name) for name, row in tables.PAPERS.items() if not row.variant
  },
  **{f'compressed-{name}': wrapped(name) for name in INNER},
  **{
    f'compensated-{name}': compensated(name) for name in ('adam', 'sgd', 'muon')
  },
}


def two_steps(tx, tree):
  """Parameters and states, of before, between and after two updates."""
  params, grads, _ = tree

  def step(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return jax.tree.map(_apply, params, updates), state

  # Traced once if nothing has changed; Python numbers would come as arrays.
  if all(hasattr(x, 'dtype') for x in jax.tree.leaves(params)):
    step = jax.jit(step)
  seen = [(params, tx.init(params))]
  for _ in range(2):
    params, state = step(grads, *reversed(seen[-1]))
    seen.append((params, state))
  return seen


def _apply(p, u):
  """As `optax.apply_updates`, which does not know keys."""
  return p if odd_trees.is_key(p) else optax.apply_updates(p, u)


def shapes(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def bits(tree):
  return sum(
    x.size * (4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize)
    for x in jax.tree.leaves(tree)
  )


def check(tx, plain, tree):
  if tree.frozen:
    tx, plain = odd_trees.frozen(tx), odd_trees.frozen(plain)
  try:
    first, *others = jax.eval_shape(lambda: two_steps(tx, tree))
  except ValueError as error:
    assert re.match(r'`\w+(\[.*\])?`', str(error)), error
    if any(re.match(refused, str(error)) for refused in REFUSED):
      return
    with pytest.raises(Exception):  # noqa: B017, whatever Optax raises
      jax.eval_shape(lambda: two_steps(plain, tree))
    return
  for other in others:
    assert shapes(other) == shapes(first)
  params, state = first
  gradients = [
    jax.ShapeDtypeStruct(
      p.shape, jnp.bfloat16 if p.dtype.itemsize == 2 else p.dtype
    )
    for p in jax.tree.leaves(params)
    if jnp.issubdtype(p.dtype, jnp.floating)
  ]
  expected = bits(params) + bits(state) + bits(gradients)
  plan = optax_mp.memory.plan(tx, tree.params)
  assert plan.total_bytes == -(-expected // 8)


@pytest.mark.parametrize('kind', KINDS)
def test_trees_are_trained_or_refused_by_name(kind):
  @seed(list(KINDS).index(kind))  # other trees for each
  @settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=10 if kind == 'micro_adam' else 31,
    suppress_health_check=[HealthCheck.too_slow],
  )
  @given(st.data())
  def fuzz(data):
    check(*data.draw(KINDS[kind]), data.draw(odd_trees.trees()))

  fuzz()
