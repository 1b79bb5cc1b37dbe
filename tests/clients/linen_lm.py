# SPDX-License-Identifier: Apache-2.0
"""Linen on eight devices, as Flax's example lm1b: a `TrainState` in pieces.

Kernels have logical axes. The shardings of the whole state come from
`nn.get_partition_spec` and the rules, and the state is made where it belongs.
"""

import functools

from flax import linen as nn
from flax.training import train_state
import jax
import jax.numpy as jnp
import optax

from clients import data
import optax_mp

RATE, STEPS, WIDTH = 1e-2, 40, 64
RULES = (
  ('batch', 'data'),
  ('vocab', 'model'),
  ('embed', 'data'),
  ('mlp', 'model'),
)


def named(init, *names):
  return nn.with_logical_partitioning(init, names)


class Model(nn.Module):
  """The next word, from the mean of those before and the last one."""

  @nn.compact
  def __call__(self, words):
    lecun = nn.initializers.lecun_normal()
    dense = functools.partial(nn.Dense, use_bias=False)
    embed = nn.Embed(
      data.WORDS,
      WIDTH,
      embedding_init=named(nn.initializers.normal(1.0), 'vocab', 'embed'),
    )
    x = embed(words)
    counts = jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
    x = x + jnp.cumsum(x, 1) / counts
    # Blocks of 128 along 256 values, which are cut in four: their scales
    # cannot lie like the kernel.
    x = dense(4 * WIDTH, kernel_init=named(lecun, 'embed', 'mlp'))(x)
    x = nn.with_logical_constraint(jnp.tanh(x), ('batch', None, 'mlp'))
    return dense(data.WORDS, kernel_init=named(lecun, 'mlp', 'vocab'))(x)


def loss_fn(model, params, words):
  logits = model.apply({'params': params}, words[:, :-1])
  return optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), words[:, 1:]
  ).mean()


def create(model, tx, dtype, key):
  words = jnp.zeros((1, data.LENGTH), jnp.int32)
  params = model.init(key, words)['params']
  if dtype == jnp.bfloat16:
    params = optax_mp.cast(params)
  return train_state.TrainState.create(
    apply_fn=model.apply, params=params, tx=tx
  )


def sharded(model, tx, dtype, key, mesh):
  """The state, and where each of its arrays lies."""
  init = functools.partial(create, model, tx, dtype)
  specs = nn.get_partition_spec(jax.eval_shape(init, key))
  shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)
  return jax.jit(init, out_shardings=shardings)(key), shardings


def unbox(tree):
  """As lm1b does, once the state lies where it belongs."""

  def is_box(x):
    return isinstance(x, nn.LogicallyPartitioned)

  return jax.tree.map(
    lambda x: x.unbox() if is_box(x) else x, tree, is_leaf=is_box
  )


def train(make, dtype, seed=0, mesh=None, boxes=False):
  """Losses of all steps, with what `make` makes of a rate; parameters."""
  mesh = mesh or jax.make_mesh(
    (2, 4), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  model, key = Model(), jax.random.key(seed)
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    state, shardings = sharded(model, make(RATE), dtype, key, mesh)
    state = state if boxes else unbox(state)
    place = jax.sharding.NamedSharding(mesh, jax.P('data'))

    def train_step(state, words):
      loss, gradients = jax.value_and_grad(functools.partial(loss_fn, model))(
        state.params, words
      )
      return state.apply_gradients(grads=gradients), loss

    step = jax.jit(
      train_step,
      in_shardings=(shardings, place),
      out_shardings=(shardings, None),
      donate_argnums=0,
    )
    losses = []
    for words in data.sentences(STEPS, seed):
      state, loss = step(state, words)
      # Awaited: eight devices on a few cores may not run ahead, since steps
      # that wait for one another would take all threads.
      losses.append(float(loss))
  return losses, state.params
