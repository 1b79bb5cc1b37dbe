# SPDX-License-Identifier: Apache-2.0
"""Conversions of states in Flax's boxes and Variables."""

import chex
from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from optax_mp import checkpoint
import states

BF16 = jnp.bfloat16
PAIRS = [('8bit', '4bit'), ('bf16-16', 'bf16-8'), ('coat', 'factored')]


def boxed(tree):
  """With the names of axes, as Linen's modules have them."""
  return {
    'w': nn.Partitioned(tree['w'], ('embed', 'mlp')),
    'b': nn.LogicallyPartitioned(tree['b'], ('mlp',)),
  }


@pytest.mark.parametrize(('old', 'new'), PAIRS)
def test_linen(old, new):
  """Exact: what it is without boxes, in the boxes of ``init``."""
  params, state = states.saved(old)
  tx = [states.tx_of(name) for name in (old, new)]
  in_boxes = boxed(params)
  state_in_boxes = checkpoint.rebuild(tx[0], in_boxes, state)
  chex.assert_trees_all_equal_structs(state_in_boxes, tx[0].init(in_boxes))
  got = checkpoint.convert(*tx, state_in_boxes, in_boxes)
  chex.assert_trees_all_equal_structs(got, (in_boxes, tx[1].init(in_boxes)))
  expected = checkpoint.convert(*tx, state, params)
  states.assert_same_bits(jax.tree.leaves(got), jax.tree.leaves(expected))


def test_linen_and_optax():
  """Exact: from Optax and back, boxes stay on."""
  tx, plain = states.tx_of('bf16-16'), optax.adamw(1e-2)
  params = boxed(states.tree(0, jnp.float32))
  state = plain.init(params)
  there = checkpoint.convert(plain, tx, state, params, BF16)
  chex.assert_trees_all_equal_structs(there[1], tx.init(there[0]))
  back = checkpoint.convert(tx, plain, there[1], there[0], jnp.float32)
  chex.assert_trees_all_equal_structs(back, (params, state))
  chex.assert_trees_all_equal(back, (params, state))
  got = checkpoint.to_optax(tx, there[1], there[0])
  chex.assert_trees_all_equal_structs(got, state)


class Model(nnx.Module):
  """The parameters of a state."""

  def __init__(self, params):
    self.w, self.b = nnx.Param(params['w']), nnx.Param(params['b'])


def bare(tree):
  """Arrays in the order of their names, without Variables."""
  return [x for _, x in sorted(checkpoint.to_arrays(tree).items())]


def going_on(tx, state):
  """``tx``, whose first state is one that is there already."""
  return optax.GradientTransformation(lambda params: state, tx.update)


@pytest.mark.parametrize(('old', 'new'), PAIRS)
def test_nnx(old, new):
  """Exact: another optimizer goes on with the state of the first one."""
  model = Model(states.tree(0, BF16))
  tx = [states.tx_of(name) for name in (old, new)]
  optimizer = nnx.Optimizer(model, tx[0], wrt=nnx.Param)
  optimizer.update(model, nnx.state(model, nnx.Param))
  variables = nnx.state(model, nnx.Param)
  for state in (
    optimizer.opt_state,
    checkpoint.rebuild(tx[0], variables, nnx.state(optimizer.opt_state)),
  ):
    params, converted = checkpoint.convert(*tx, state, variables)
    chex.assert_trees_all_equal_structs(params, variables)
    plain = {'w': model.w.get_value(), 'b': model.b.get_value()}
    plain_state = checkpoint.rebuild(tx[0], plain, state)
    expected = checkpoint.convert(*tx, plain_state, plain)
    states.assert_same_bits(bare(converted), bare(expected[1]))
    # It goes into an optimizer as what `init` returns.
    nnx.update(model, params)
    again = nnx.Optimizer(model, going_on(tx[1], converted), wrt=nnx.Param)
    fresh = nnx.Optimizer(model, tx[1], wrt=nnx.Param)
    chex.assert_trees_all_equal_structs(
      nnx.state(again.opt_state), nnx.state(fresh.opt_state)
    )
    nnx.update(model, variables)


def test_nnx_to_optax():
  """Exact: the structure of Optax's own state of these Variables."""
  model, tx = Model(states.tree(0, BF16)), states.tx_of('8bit')
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  variables = nnx.state(model, nnx.Param)
  plain = checkpoint.to_optax(tx, optimizer.opt_state, variables)
  like = optax.adamw(1e-2).init(variables)
  assert jax.tree.structure(plain) == jax.tree.structure(like)
  back = checkpoint.from_optax(tx, plain, variables)
  assert jax.tree.structure(back) == jax.tree.structure(tx.init(variables))
