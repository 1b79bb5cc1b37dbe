# SPDX-License-Identifier: Apache-2.0
"""What a model may be: several stacks, arguments of layers, any `h`."""

import re

import chex
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_mp import backward
import quick
import stacks

LAYERS, WIDTH = 3, 4
CLOSE = {'rtol': 1e-5, 'atol': 1e-7}  # derived: two programs, sums in any order
SGD = optax.sgd(1.0)


def normal(*shape, seed=0):
  return 0.5 * jax.random.normal(jax.random.key(seed), shape)


def scanned(block_fn, stack):
  """`blocks` as one would write it, for `jax.grad`."""

  def blocks(h, *args, scanned=()):
    def body(h, x):
      return block_fn(x[0], h, *args, *x[1]), None

    return lax.scan(body, h, (stack, scanned))[0]

  return blocks


def check(loss_fn, block_fn, rest, stack, *batch, has_aux=False, **options):
  """A step of size 1 is the gradient. Returns what the step returns."""

  def plain(rest, stack):
    if isinstance(block_fn, dict):
      blocks = {k: scanned(block_fn[k], stack[k]) for k in stack}
    else:
      blocks = scanned(block_fn, stack)
    return loss_fn(rest, blocks, *batch)

  step = backward.fused_step(loss_fn, block_fn, SGD, has_aux=has_aux, **options)
  state = step.init(rest, stack)
  grads = jax.jit(jax.grad(plain, (0, 1), has_aux=has_aux))(rest, stack)
  expected = plain(rest, stack)
  grads = grads[0] if has_aux else grads
  assert all(np.any(g != 0) for g in jax.tree.leaves(grads))
  *new, _, out = jax.jit(step)(rest, stack, state, *batch)
  old = jax.tree.map(lambda p, g: p - g, (rest, stack), grads)
  chex.assert_trees_all_close(tuple(new), old, **CLOSE)
  chex.assert_trees_all_close(out, expected, **CLOSE)
  chex.assert_trees_all_close(step.loss(rest, stack, *batch), expected, **CLOSE)
  again = jax.grad(step.loss, (0, 1), has_aux=has_aux)(rest, stack, *batch)
  chex.assert_trees_all_close(again[0] if has_aux else again, grads, **CLOSE)
  return out


def layer(p, h):
  return h + jnp.tanh(h @ p['w'])


REST = {'in': normal(6, WIDTH, seed=1), 'out': normal(WIDTH, seed=2)}
STACK = {'w': normal(LAYERS, WIDTH, WIDTH)}
X = normal(5, 6, seed=3)


def test_encoder_and_decoder():
  """The encoder's output is an argument of each of the decoder's layers."""

  def encode(p, h, mask):
    return layer(p, h * mask[:, None])

  def decode(p, h, memory, positions):
    return layer(p, h) + (memory @ p['cross'])[positions]

  def loss_fn(rest, blocks, x, mask, positions):
    memory = blocks['encoder'](x @ rest['in'], mask)
    h = blocks['decoder'](2 * x @ rest['in'], memory, positions)
    return jnp.sum(jnp.sin(h) @ rest['out'])

  shape = (2, WIDTH, WIDTH)
  stack = {
    'encoder': STACK,
    'decoder': {'w': normal(*shape, seed=4), 'cross': normal(*shape, seed=5)},
  }
  mask = jnp.array([True, False, True, True, True])
  functions = {'encoder': encode, 'decoder': decode}
  check(loss_fn, functions, REST, stack, X, mask, jnp.arange(5)[::-1])
  check(
    loss_fn, functions, REST, stack, X, mask, jnp.arange(5)[::-1],
    max_norm=1e9, skip_nonfinite=True,
  )  # fmt: skip


def test_h_is_any_pytree_and_integers_pass_through():
  """A running sum of losses, as of experts, and a count of layers."""

  def block_fn(p, h):
    x = layer(p, h['x'])
    return {
      'x': x * (1 + h['count']).astype(x.dtype),
      'loss': h['loss'] + jnp.mean(x**2),
      'count': h['count'] + 1,
    }

  def loss_fn(rest, blocks, x):
    h = {'x': x @ rest['in'], 'loss': jnp.float32(0), 'count': jnp.int32(0)}
    h = blocks(h)
    loss = jnp.sum(jnp.sin(h['x']) @ rest['out']) + 0.1 * h['loss']
    return loss, h['count']

  _, count = check(loss_fn, block_fn, REST, STACK, X, has_aux=True)
  assert count == LAYERS


def test_dropout_keys_and_gates_of_each_layer():
  """Typed keys and float arrays with an axis for layers; a Python bool."""

  def block_fn(p, h, train, scale, gate, key):
    assert train is True
    keep = jax.random.bernoulli(key, 0.5, h.shape)
    return h + gate * scale * jnp.where(keep, jnp.tanh(h @ p['w']), 0)

  def loss_fn(rest, blocks, x, key):
    keys = jax.random.split(key, LAYERS)
    gates = rest['out'][:LAYERS]
    h = blocks(x @ rest['in'], True, rest['out'], scanned=(gates, keys))
    return jnp.sum(h**2 @ rest['out'])

  check(loss_fn, block_fn, REST, STACK, X, jax.random.key(7))


def test_the_layers_need_neither_trained_inputs_nor_a_loss():
  """Weight decay moves them, even if the loss does not depend on them."""

  def loss_fn(rest, blocks, x):
    return jnp.sum(blocks(x[:, :WIDTH])) * 0 + jnp.sum(rest['out'] ** 2)

  def detached(rest, blocks, x):
    return jnp.sum(lax.stop_gradient(blocks(x[:, :WIDTH])) @ rest['out'])

  tx = optax.chain(optax.add_decayed_weights(0.5), SGD)
  for each in (loss_fn, detached):
    step = backward.fused_step(each, layer, tx)
    state = step.init(REST, STACK)
    _, stack, _, _ = quick.jit(step)(REST, STACK, state, X)
    chex.assert_trees_all_close(stack['w'], 0.5 * STACK['w'], rtol=1e-6)

  def frozen_inputs(rest, blocks, x):
    return jnp.sum(blocks(x[:, :WIDTH]) @ rest['out'])

  rest = {'out': REST['out']}
  check(frozen_inputs, layer, rest, STACK, X)


def test_a_policy_changes_no_number():
  """Derived: with dots kept or nothing. And exact: it is not passed over."""

  def loss_fn(rest, blocks, x):
    return jnp.sum(jnp.sin(blocks(x @ rest['in'])) @ rest['out'])

  for policy in ('dots_saveable', 'nothing_saveable'):
    policy = getattr(jax.checkpoint_policies, policy)
    check(loss_fn, layer, REST, STACK, X, policy=policy)
    assert recomputing(loss_fn, policy=policy) == 1
  assert recomputing(loss_fn) == 0


def recomputing(loss_fn, **options):
  """How often the program recomputes the inside of a layer."""
  step = backward.fused_step(loss_fn, layer, SGD, **options)
  state = step.init(REST, STACK)
  made = jax.make_jaxpr(step)(REST, STACK, state, X)
  return len(re.findall(r'= (?:remat|checkpoint)\d*\[', str(made)))


def test_adam_on_one_layer_and_rest_alone():
  """A stack may be one layer, and `rest` may be empty."""

  def loss_fn(rest, blocks, x):
    return jnp.mean(blocks(x[:, :WIDTH]) ** 2)

  step = backward.fused_step(loss_fn, layer, optax.adam(1e-2))
  stack = jax.tree.map(lambda x: x[:1], STACK)
  rest, state = {}, step.init({}, stack)
  train, losses = quick.jit(step), []
  for _ in range(30):
    rest, stack, state, loss = train(rest, stack, state, X)
    losses.append(loss)
  assert rest == {} and losses[-1] < 0.9 * losses[0]


STEP = {'loss_fn': stacks.loss_fn, 'block_fn': stacks.block_fn, 'tx': SGD}


@pytest.mark.parametrize(
  'options, message',
  [
    ({'loss_fn': 3}, '`loss_fn` must be a function; got 3'),
    ({'block_fn': {}}, '`block_fn` must name a function for each stack'),
    ({'block_fn': {'a': 1}}, r"`block_fn\['a'\]` must be a function; got 1"),
    ({'tx': 0.1}, '`tx` must be an Optax transformation .*; got 0.1'),
    ({'tx': optax.MultiSteps(SGD, 2)}, 'optax.MultiSteps`, which accumul.*Use'),
    ({'max_norm': 0.0}, '`max_norm` must be a positive .* None .*; got 0.0'),
    ({'max_norm': -1}, '`max_norm` must be a positive number'),
    ({'max_norm': jnp.ones(())}, '`max_norm` must be a positive number'),
    ({'norm_mode': 'last'}, "`norm_mode` must be .*; got 'last'"),
    ({'norm_mode': 'previous'}, '`norm_mode` does nothing without `max_norm`'),
    ({'policy': 'dots'}, "`policy` must be one of .*; got 'dots'"),
  ],
)
def test_options_that_are_none(options, message):
  with pytest.raises(ValueError, match=message):
    backward.fused_step(**(STEP | options))


@pytest.mark.parametrize(
  'tx',
  [
    optax.MultiSteps(SGD, 2).gradient_transformation(),
    optax.chain(optax.apply_every(4), SGD),
  ],
)
def test_accumulation_is_refused(tx):
  """Wherever it is in the transformation: before there is any step."""
  model = stacks.model()
  step = backward.fused_step(stacks.loss_fn, stacks.block_fn, tx)
  with pytest.raises(ValueError, match='accumulates gradients, .* Use a'):
    step.init(model.rest, model.stack)


@pytest.mark.parametrize(
  'rest, stack, message',
  [
    (REST, {}, '`stack` must have arrays; got none'),
    (REST, {'w': jnp.ones((0, 4))}, 'same number of layers, one or more'),
    (REST, {'w': jnp.ones(())}, 'same number of layers, one or more'),
    (
      REST,
      {'w': jnp.ones((3, 4)), 'b': jnp.ones((2, 4))},
      r"same number of layers, .*got {'b': 2, 'w': 3}. Stack the layers with",
    ),
    (REST, {'w': jnp.ones((3, 4), int)}, "real floats; got int32 at 'w"),
    (REST, {'w': jnp.ones((3, 4), complex)}, 'got complex64 .* as pairs of'),
    ({'n': 3.0}, STACK, "`rest` must be parameters, .* got float at 'n'"),
  ],
)  # fmt: skip
def test_trees_that_are_no_parameters(rest, stack, message):
  step = backward.fused_step(**STEP)
  with pytest.raises(ValueError, match=message):
    step.init(rest, stack)


def test_parameters_are_not_reached_through_blocks():
  """Without their gradients, that is: weight decay belongs into `tx`."""

  def loss_fn(rest, blocks, x):
    return sums(rest, blocks, x) + jnp.sum(blocks.stack['w'] ** 2)

  step = backward.fused_step(loss_fn, layer, SGD)
  with pytest.raises(AttributeError, match='stack'):
    step.loss(REST, STACK, X)
  with pytest.raises(AttributeError, match='stack'):
    step(REST, STACK, step.init(REST, STACK), X)


def sums(rest, blocks, x):
  return jnp.sum(blocks(x @ rest['in']) @ rest['out'])


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'loss_fn': lambda r, b, x: jnp.sum(r['in'])}, 'once; it never did'),
    (
      {'loss_fn': lambda r, b, x: jnp.sum(b(b(x @ r['in'])) @ r['out'])},
      'once; it called it twice',
    ),
    (
      {
        'loss_fn': lambda r, b, x: jnp.sum(
          jax.jit(lambda h: b(h))(x @ r['in']) @ r['out']
        )
      },
      'must call `blocks.h, ....` itself; got a call inside',
    ),
    (
      {
        'loss_fn': lambda r, b, x: jnp.sum(
          lax.scan(lambda h, _: (b(h), None), x @ r['in'], length=2)[0]
        )
      },
      'itself; got a call inside a `jit`, `checkpoint`, `scan`',
    ),
    ({'loss_fn': lambda r, b, x: b(x @ r['in'])}, 'must return a scalar'),
    ({'loss_fn': lambda r, b, x: (sums(r, b, x), 1)}, 'must return a scalar'),
    (
      {'block_fn': lambda p, h: (h @ p['w']).astype(jnp.bfloat16)},
      r"must return `h` .* got \['float32\[5, 4\]'\] and it returned "
      r"\['bfloat16\[5, 4\]'\]",
    ),
    ({'block_fn': lambda p, h: (h @ p['w'])[:2]}, '`block_fn` must return `h`'),
    ({'block_fn': lambda p, h: (h, h)}, '`block_fn` must return `h`'),
    (
      {'loss_fn': lambda r, b, x: jnp.sum(b(x @ r['in'], scanned=x))},
      r'`scanned` must have a first axis of 3 layers; got \(5, 6\)',
    ),
  ],
)  # fmt: skip
def test_models_that_are_none(changes, message):
  """While tracing: nothing is trained wrongly."""
  options = STEP | {'loss_fn': sums, 'block_fn': layer} | changes
  step = backward.fused_step(**options)
  state = step.init(REST, STACK)
  with pytest.raises(ValueError, match=message):
    quick.jit(step)(REST, STACK, state, X)


def test_states_and_stacks_of_another_step():
  step = backward.fused_step(sums, {'a': layer}, SGD)
  with pytest.raises(ValueError, match=r"keys of `block_fn`, \['a'\]; got"):
    step.init(REST, STACK)
  plain = backward.fused_step(sums, layer, SGD)
  with pytest.raises(ValueError, match='`state` must be the FusedState'):
    plain(REST, STACK, SGD.init(STACK), X)
  low = optax.tree.cast(STACK, jnp.bfloat16)
  step = backward.fused_step(
    sums, lambda p, h: h @ p['w'].astype(h.dtype), optax.sgd(1.0, momentum=0.9)
  )
  state = step.init(REST, low)
  with pytest.raises(ValueError, match='`tx` must keep .* with `loss_scale`'):
    step(REST, low, state, X, loss_scale=2.0)
