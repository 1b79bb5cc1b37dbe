# SPDX-License-Identifier: Apache-2.0
"""A derivative through a step is an error and not 0."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_mp
from optax_mp import backward
from optax_mp import formats
import tables

BF16 = jnp.bfloat16
WEIGHT = jax.random.normal(jax.random.key(0), (8, 128))
WHOLE = {f'compensated-{b}': b for b in (16, 8, 0)}
RAISES = pytest.raises(ValueError, match='a derivative through a step')


def trained(tx, params, gradients=None):
  """Two steps; without gradients, down the parameters themselves."""
  state = tx.init(params)
  for _ in range(2):
    own = params if gradients is None else gradients
    updates, state = tx.update(own, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def size(params):
  return jnp.mean(params.astype(jnp.float32) ** 2)


def recipe(name, rate):
  # As the derivative of a rate has it, hyperparameters are traced.
  return tables.RECIPES[name].recipe(
    rate, min_size=0, **tables.RECIPES[name].settings
  )


@pytest.mark.parametrize('name', tables.RECIPES)
def test_in_the_learning_rate(name):
  """What float32 Optax has a derivative for, and integers have none."""

  def final(rate):
    return size(trained(recipe(name, rate), WEIGHT.astype(BF16))[0])

  with RAISES:
    jax.eval_shape(jax.grad(final), 1e-2)
  with RAISES:
    jax.grad(jax.jit(final))(1e-2)


def test_operation_by_operation():
  """While nothing is traced but the derivative."""
  weight = WEIGHT.astype(BF16)
  with RAISES:
    jax.grad(lambda rate: size(trained(recipe('lion_8bit', rate), weight)[0]))(
      1e-2
    )


@pytest.mark.parametrize('name', WHOLE)
@pytest.mark.parametrize('dtype', [BF16, jnp.float16])
def test_in_initial_parameters_and_gradients(name, dtype):
  """16-bit parameters and gradients are widened by their bits."""
  tx = optax_mp.compensated(optax.sgd(1e-2, momentum=0.9), WHOLE[name])
  weight = WEIGHT.astype(dtype)
  with RAISES:
    jax.eval_shape(jax.grad(lambda w: size(trained(tx, w)[0])), weight)
  with RAISES:
    jax.eval_shape(jax.grad(lambda g: size(trained(tx, weight, g)[0])), weight)


@pytest.mark.parametrize('name', tables.FORMATS)
def test_through_a_stored_momentum(name):
  """float32 all along, but for the state."""
  row = tables.FORMATS[name]
  tx = optax_mp.compressed(optax.sgd(0.1, 0.9), row.format, min_size=0)
  positive = jnp.abs(WEIGHT)

  def final(scale):
    state = tx.init(positive)
    _, state = tx.update(scale * positive, state, positive)
    updates, _ = tx.update(jnp.zeros_like(positive), state, positive)
    return jnp.sum(updates)

  with RAISES:
    jax.eval_shape(jax.grad(final), 1.0)
  with RAISES:
    jax.jvp(jax.jit(final), (1.0,), (1.0,))


@pytest.mark.parametrize('name', tables.FORMATS)
def test_of_what_is_decoded(name):
  """`decode_tree` in a loss is for weights without gradients."""
  format, x = tables.FORMATS[name].format, jnp.abs(WEIGHT)
  stored = formats.encode_tree(x, format, jax.random.key(0))
  floats, treedef = jax.tree.flatten(stored)
  at = [
    i for i, x in enumerate(floats) if jnp.issubdtype(x.dtype, jnp.floating)
  ]

  def loss(part, i):
    parts = [*floats[:i], part, *floats[i + 1 :]]
    return size(formats.decode_tree(treedef.unflatten(parts), x, format))

  for i in at:
    with RAISES:
      jax.grad(loss)(floats[i], i)


def test_inside_scan_and_vmap():
  tx = optax_mp.adamw_8bit(1e-3, min_size=0)
  weight = WEIGHT.astype(BF16)

  def final(scale):
    def step(carry, _):
      params, state = carry
      updates, state = tx.update(params * scale.astype(BF16), state, params)
      return (optax.apply_updates(params, updates), state), None

    carry = jax.lax.scan(step, (weight, tx.init(weight)), length=3)[0]
    return size(carry[0])

  for each in (final, lambda x: jnp.sum(jax.vmap(final)(x[None]))):
    assert jnp.isfinite(each(jnp.float32(1.0)))
    with RAISES:
      jax.grad(each)(jnp.float32(1.0))


def test_micro_adam_has_errors_in_four_bits():
  tx = optax_mp.micro_adam(1e-3)
  with RAISES:
    jax.eval_shape(jax.grad(lambda g: size(trained(tx, WEIGHT, g)[0])), WEIGHT)


@pytest.mark.parametrize('name', ['adamw_bf16', 'adamw_8bit', 'coat_adamw'])
def test_beside_a_derivative_all_is_well(name):
  """A whole step may be inside of what is differentiated for something else."""
  tx, weight = recipe(name, 1e-2), WEIGHT.astype(BF16)

  @functools.partial(jax.jit, static_argnums=1)
  def loss(x, stop):
    gradients = jax.lax.stop_gradient(weight * x.astype(BF16)) if stop else None
    params, state = trained(tx, weight, gradients)
    return x * size(params), state

  alone = size(trained(tx, weight)[0])
  value, _ = jax.grad(loss, has_aux=True)(jnp.float32(2.0), False)
  # kind: derived. Two programs, which fuse differently: a few ulps.
  chex.assert_trees_all_close(value, alone, rtol=1e-3)
  value, _ = jax.grad(loss, has_aux=True)(jnp.float32(2.0), True)
  assert value > 0


def test_in_the_backward_pass():
  """`fused_step` updates in one; its loss has derivatives as usual."""

  def block(layer, h):
    return h + jnp.tanh(h @ layer['w'])

  def loss_fn(rest, blocks, x):
    return jnp.mean((blocks(x) @ rest['head']).astype(jnp.float32) ** 2)

  tx = optax_mp.adamw_8bit(1e-2, min_size=0)
  step = backward.fused_step(loss_fn, block, tx, skip_nonfinite=True)
  stack = {'w': jnp.ones((2, 8, 8), BF16)}
  rest = {'head': jnp.ones((8, 8), BF16)}
  x = jnp.ones((4, 8), BF16)
  state = step.init(rest, stack)
  *_, loss = jax.jit(step)(rest, stack, state, x)
  assert jnp.isfinite(loss)
  assert jnp.any(jax.grad(step.loss)(rest, stack, x)['head'] != 0)
