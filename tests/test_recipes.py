# SPDX-License-Identifier: Apache-2.0
"""Recipes: Optax's signature, and nothing but a combination of the parts."""

from collections.abc import Callable
import dataclasses
import functools
import inspect
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
import pytest

import optax_mp
from optax_mp import formats

BF16 = jnp.bfloat16
STOCHASTIC = 'stochastic'


@dataclasses.dataclass(frozen=True)
class Parts:
  """What a recipe is made of."""

  base: Callable[..., Any]
  rule: Callable[[Any], Any]  # of the rounding that `decay` decides on
  decay: str = ''  # the argument that does
  rounding: str | int = 10  # for its default, 0.9
  defaults: dict[str, Any] = dataclasses.field(default_factory=dict)

  def make(self, rounding, residual_bits=8, seed=0, **kwargs: Any):
    inner = self.base(0.01, **{**self.defaults, **kwargs})
    small = optax_mp.compressed(inner, self.rule(rounding), seed=seed)
    return optax_mp.compensated(small, residual_bits, seed=seed)


def int8(rounding, **settings):
  """Rounded stochastically, or only below a code."""
  if rounding != STOCHASTIC:
    settings['stochastic_below'] = rounding
  return formats.BlockInt(8, rounding=STOCHASTIC, **settings)


def divided(rounding):
  """Of a first moment that stands above the root of a second one."""
  if rounding == STOCHASTIC:
    return int8(rounding)
  return int8(10 + rounding, map='sqrt_log')


def fp8(rounding, **settings):
  rounding = STOCHASTIC if rounding == STOCHASTIC else 'nearest'
  return formats.Float8(rounding=rounding, **settings)


def of_muon_or_adam(rounding):
  return lambda path, _: (
    divided(10) if re.search('/adam/', path) else int8(rounding)
  )


def small_squares(path, leaf):
  del path
  return formats.Factored() if len(leaf.shape) > 1 else SQUARES_4


SPLIT = formats.Split(8)
SQUARES = int8(STOCHASTIC, signed=False)
SQUARES_4 = formats.BlockInt(4, signed=False, rounding=STOCHASTIC)
SIGNED_4 = formats.BlockInt(4, map='softsign', rounding=STOCHASTIC)
FLASH_SQUARES = int8(STOCHASTIC, signed=False, map='sqrt', block_size=32)
MOMENTUM = {'momentum': 0.9}

IN_BFLOAT16 = {
  'adamw_bf16': Parts(optax.adamw, lambda r: SPLIT),
  'sgdm_bf16': Parts(optax.sgd, lambda r: SPLIT, defaults=MOMENTUM),
  'lion_bf16': Parts(optax.lion, lambda r: SPLIT),
}
WITH_DECAY = {
  'adamw_8bit': Parts(
    optax.adamw, lambda r: {'mu': divided(r), 'nu': SQUARES}, 'b1'
  ),
  'coat_adamw': Parts(
    optax.adamw,
    lambda r: {
      'mu': fp8(r),
      'nu': fp8(STOCHASTIC, signed=False),
    },
    'b1',
  ),
  'flash_adamw': Parts(
    optax.adamw,
    lambda r: {
      'mu': int8(r, map='softsign', block_size=32),
      'nu': FLASH_SQUARES,
    },
    'b1',
  ),
  'lion_8bit': Parts(optax.lion, lambda r: {'mu': int8(r)}, 'b2', STOCHASTIC),
  'sgdm_8bit': Parts(
    optax.sgd, lambda r: {'trace': int8(r)}, 'momentum', defaults=MOMENTUM
  ),
  'muon_8bit': Parts(
    contrib.muon,
    lambda r: {'mu': of_muon_or_adam(r), 'nu': SQUARES},
    'beta',
    STOCHASTIC,
  ),
  'ademamix_8bit': Parts(
    contrib.ademamix,
    lambda r: {'m1': divided(r), 'm2': int8(STOCHASTIC), 'nu': SQUARES},
    'b1',
  ),
}
IN_FEW_BITS = {
  **WITH_DECAY,
  'adamw_4bit': Parts(optax.adamw, lambda r: {'mu': SIGNED_4, 'nu': SQUARES_4}),
  'adamw_4bit_factored': Parts(
    optax.adamw, lambda r: {'mu': SIGNED_4, 'nu': small_squares}
  ),
}
RECIPES = {**IN_BFLOAT16, **IN_FEW_BITS}


def recipe(name, *args, **kwargs):
  return getattr(optax_mp, name)(*args, **kwargs)


def like(**shapes):
  return {k: jax.ShapeDtypeStruct(shape, BF16) for k, shape in shapes.items()}


FEW = like(w=(64, 64), vector=(4096,))
PARAMS = {**FEW, **like(stack=(2, 8, 256), bias=(64,))}


def test_all_recipes_are_here():
  names = [n for n in optax_mp.__all__ if re.search(r'_\w*(bit|bf16|adamw)', n)]
  assert set(names) == set(RECIPES)


@pytest.mark.parametrize('name', RECIPES)
def test_signature_is_that_of_optax_and_ours(name):
  row = RECIPES[name]
  theirs = {
    k: row.defaults.get(k, p.default)
    for k, p in inspect.signature(row.base).parameters.items()
  }
  ours = {'residual_bits': 16, 'min_size': 4096, 'seed': 0}
  if name in IN_FEW_BITS:
    ours |= {'residual_bits': 8, 'keep_float32': None}
  got = inspect.signature(getattr(optax_mp, name)).parameters
  assert {k: p.default for k, p in got.items()} == {**theirs, **ours}


@pytest.mark.parametrize('bits', [16, 8, 0])
@pytest.mark.parametrize('name', IN_BFLOAT16)
def test_a_recipe_is_its_parts(name, bits):
  """Exact, step by step."""
  parts = RECIPES[name].make('', bits, seed=3)
  params = {'w': jnp.ones((64, 64), BF16)}
  grads = jax.tree.map(jnp.sin, params)
  results = []
  for tx in (recipe(name, 0.01, residual_bits=bits, seed=3), parts):
    state = tx.init(params)
    for _ in range(2):
      updates, state = tx.update(grads, state, params)
    results.append((updates, state))
  chex.assert_trees_all_equal(*results)


def program(make, decay, params: Any = PARAMS):
  """All that `update` computes; a decay that is a ShapeDtypeStruct is traced.

  Each rounding, each map and each block size makes another one.
  """
  traced = isinstance(decay, jax.ShapeDtypeStruct)
  if traced:  # in `init`, too: a state keeps the map that it was made with
    state = jax.eval_shape(lambda x: make(x).init(params), decay)
  else:
    state = jax.eval_shape(make(decay).init, params)

  def update(decay, *args):
    return make(decay).update(*args)

  args = (params, state, params)
  if not traced:
    made = jax.make_jaxpr(lambda *args: update(decay, *args))(*args)
  else:
    made = jax.make_jaxpr(update)(decay, *args)
  return str(made), [np.asarray(x).tolist() for x in made.consts]


@pytest.mark.parametrize('bits', [16, 8, 0])
@pytest.mark.parametrize('name', IN_FEW_BITS)
def test_a_recipe_in_few_bits_is_its_parts(name, bits):
  """Exact: the program is the same, with the residuals that are asked for."""
  row, kwargs = RECIPES[name], {} if bits == 8 else {'residual_bits': bits}
  got = program(lambda _: recipe(name, 0.01, **kwargs), None)
  assert got == program(lambda _: row.make(row.rounding, bits), None)
  state = jax.eval_shape(recipe(name, 0.01, **kwargs).init, PARAMS)
  sizes = [x.dtype.itemsize * 8 for x in jax.tree.leaves(state.residual)]
  assert sizes == ([bits] * len(PARAMS) if bits else [])


@pytest.mark.parametrize('name', IN_FEW_BITS)
def test_the_seed_is_passed_on(name):
  """Exact: and so is all else that `init` makes."""
  row, params = RECIPES[name], optax.tree.zeros_like(FEW)
  state = recipe(name, 0.01, seed=3).init(params)
  chex.assert_trees_all_equal(
    state, row.make(row.rounding, seed=3).init(params)
  )


DECAYS = {
  'small': (0.94, 16),
  'small, of NumPy': (np.float32(0.94), 16),
  'large': (0.95, STOCHASTIC),
  'not known': (jax.ShapeDtypeStruct((), jnp.float32), STOCHASTIC),
}


@pytest.mark.parametrize('size', DECAYS)
@pytest.mark.parametrize('name', WITH_DECAY)
def test_the_decay_decides_on_the_rounding(name, size):
  """Exact. A step of less than half a code needs noise to be seen."""
  row, (decay, rounding) = RECIPES[name], DECAYS[size]
  got = program(lambda x: recipe(name, 0.01, **{row.decay: x}), decay, FEW)
  for each in (16, STOCHASTIC):
    made = program(lambda x, r=each: row.make(r, **{row.decay: x}), decay, FEW)
    assert (got == made) == (each == rounding)


def test_positional_decays_decide_too():
  """Exact: `optax.adamw(learning_rate, b1, ...)`."""
  by_name = program(lambda x: optax_mp.adamw_8bit(0.01, b1=x), 0.99, FEW)
  assert program(lambda x: optax_mp.adamw_8bit(0.01, x), 0.99, FEW) == by_name


def test_the_slow_average_of_ademamix_has_its_own_decay():
  """Exact."""
  row = Parts(
    contrib.ademamix,
    lambda r: {'m1': int8(STOCHASTIC), 'm2': divided(10), 'nu': SQUARES},
  )
  got = program(lambda _: optax_mp.ademamix_8bit(0.01, b1=0.99, b3=0.9), None)
  assert got == program(lambda _: row.make('', b1=0.99, b3=0.9), None)


EMBEDDED = {'embed': {'table': PARAMS['w']}, 'head': {'kernel': PARAMS['w']}}


@pytest.mark.parametrize(
  'pattern, kept',
  [
    (None, set()),
    ('embed', {'embed'}),
    ('bed/table$', {'embed'}),
    ('embed|head', {'embed', 'head'}),
    ('(?i)HEAD', {'head'}),
    (re.compile('h.*l'), {'head'}),
  ],
)
@pytest.mark.parametrize('name', IN_FEW_BITS)
def test_keep_float32(name, pattern, kept):
  """A regular expression, found somewhere in the path of a parameter."""
  tx = recipe(name, 0.01, keep_float32=pattern)
  state = jax.eval_shape(tx.init, EMBEDDED).inner_state
  found = {'embed': set(), 'head': set()}
  leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=formats.is_stored)
  for path, leaf in leaves:
    text = jax.tree_util.keystr(path, simple=True, separator='/')
    for layer in found:
      if layer in text.split('/'):
        found[layer].add(formats.is_stored(leaf))
  assert found == {layer: {layer not in kept} for layer in found}


def test_no_regular_expression():
  for pattern in ('(', 3, ['embed']):
    with pytest.raises(ValueError, match='`keep_float32` must be a regular'):
      optax_mp.adamw_8bit(0.01, keep_float32=pattern)  # pyright: ignore


def test_keep_float32_that_keeps_nothing():
  tx = optax_mp.adamw_8bit(0.01, keep_float32='norm')
  with pytest.warns(UserWarning, match="`keep_float32`.*got 'norm'.*'embed/"):
    jax.eval_shape(tx.init, EMBEDDED)


def test_momentum_is_optax_s_to_choose():
  params: Any = {'w': jnp.ones((64, 64), BF16)}
  tx = optax_mp.sgdm_bf16(0.1, 0.5, nesterov=True)
  grads = jax.tree.map(jnp.ones_like, params)
  updates, _ = tx.update(grads, tx.init(params), params)
  expected = jnp.asarray(1 - 0.1 * 1.5, BF16)
  assert jnp.all(optax.apply_updates(params, updates)['w'] == expected)


@pytest.mark.parametrize('name', RECIPES)
def test_unknown_arguments_are_refused(name):
  with pytest.raises(TypeError, match='learning_rat'):
    recipe(name, learning_rat=0.1)
  with pytest.raises(ValueError, match='`residual_bits` must be one of'):
    recipe(name, 1e-3, residual_bits=4)


def test_groups_of_small_leaves():
  """Weight decay for matrices only, by groups, as many programs do it."""
  groups: Any = {
    'decay': optax_mp.adamw_bf16(1e-3, weight_decay=0.1),
    'none': optax_mp.adamw_bf16(1e-3, weight_decay=0.0),
  }
  tx = optax.partition(groups, {'w': 'decay', 'b': 'none'})
  params = {'w': jnp.ones((64, 64), BF16), 'b': jnp.ones(64, BF16)}
  updates, _ = tx.update(params, tx.init(params), params)
  chex.assert_tree_all_finite(updates)


@pytest.mark.filterwarnings('ignore:`keep_float32`')
def test_groups_of_which_one_keeps_float32():
  make = functools.partial(optax_mp.adamw_8bit, 1e-3, keep_float32='embed')
  groups: Any = {'decay': make(weight_decay=0.1), 'none': make()}
  tx = optax.partition(groups, {'embed': 'decay', 'b': 'none'})
  params = {'embed': jnp.ones((64, 128), BF16), 'b': jnp.ones(64, BF16)}
  updates, _ = tx.update(params, tx.init(params), params)
  chex.assert_tree_all_finite(updates)


@pytest.mark.parametrize('name', IN_FEW_BITS)
def test_groups_of_small_leaves_in_few_bits(name):
  """Traced: nothing to store in one of them is no mistake."""
  groups: Any = {'large': recipe(name, 1e-3), 'small': recipe(name, 1e-2)}
  tx = optax.partition(groups, {'w': 'large', 'bias': 'small'})
  params = like(w=(64, 64), bias=(64,))
  state = jax.eval_shape(tx.init, params)
  _, new_state = jax.eval_shape(tx.update, params, state, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@pytest.mark.parametrize(
  'params, stored',
  [(like(w=(64, 64)), ['mu']), (like(vector=(4096,)), ['mu', 'nu'])],
)
def test_muon_with_matrices_alone_or_none(params, stored):
  """Fields of which there are no arrays are no mistake either."""
  tx = optax_mp.muon_8bit(1e-3)
  state = jax.eval_shape(tx.init, params)
  _, new_state = jax.eval_shape(tx.update, params, state, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
  fields = [
    key.name
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      state, is_leaf=formats.is_stored
    )
    if formats.is_stored(leaf)
    for key in path
    if getattr(key, 'name', '') in ('mu', 'nu')
  ]
  assert fields == stored


@pytest.mark.parametrize('name', ['sgdm_bf16', 'sgdm_8bit'])
def test_sgd_without_momentum_has_nothing_to_store(name):
  with pytest.raises(ValueError, match='`momentum` must be a number; got None'):
    recipe(name, 0.1, momentum=None)


@pytest.mark.parametrize('name', RECIPES)
def test_formats_take_the_place_of_a_narrow_dtype(name):
  narrow = 'accumulator_dtype' if name.startswith('sgdm') else 'mu_dtype'
  with pytest.raises(ValueError, match='Leave out `mu_dtype`'):
    jax.eval_shape(recipe(name, 1e-3, **{narrow: BF16}).init, PARAMS)
