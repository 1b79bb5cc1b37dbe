# SPDX-License-Identifier: Apache-2.0
"""Adam-mini against a slow reference, AdamW and Subset-Norm, and its blocks."""

import functools

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import memory
from optax_mp import optimizers
from optax_mp.optimizers import Blocks
import recorded
from reference import adam_mini as reference
import train_gpt


def number(shape, *axes):
  """Labels that count along some axes."""
  labels = np.zeros(shape, int)
  for axis in axes:
    index = np.arange(shape[axis]).reshape(
      [-1 if i == axis else 1 for i in range(len(shape))]
    )
    labels = labels * shape[axis] + index
  return labels


def of_columns(shape, blocks):
  """Labels of a matrix whose columns have these."""
  return np.broadcast_to(np.repeat(range(len(blocks)), blocks), shape)


# Four heads, of size 2: the leaf's path, its shape, and labels of its blocks.
LEAVES = {
  'query/kernel': ((6, 8), of_columns((6, 8), [2] * 4)),
  'k_proj/kernel': ((6, 8), of_columns((6, 8), [2] * 4)),
  'value/kernel': ((6, 8), number((6, 8), 1)),
  'out/kernel': ((8, 6), number((8, 6), 1)),
  'mlp_0/kernel': ((6, 5), number((6, 5), 1)),
  'mlp_0/bias': ((5,), number((5,), 0)),
  'qkv/kernel': ((6, 24), of_columns((6, 24), [2] * 8 + [1] * 8)),
  'token_embed/embedding': ((7, 6), number((7, 6), 0)),
  'LayerNorm_0/scale': ((6,), number((6,))),
  'LayerNorm_0/bias': ((6,), number((6,), 0)),
  'lm_head/kernel': ((6, 7), number((6, 7), 1)),
  'attention/query/kernel': ((6, 4, 2), number((6, 4, 2), 1)),
  'attention/value/kernel': ((6, 4, 2), number((6, 4, 2), 1, 2)),
  'attention/out/kernel': ((4, 2, 8), number((4, 2, 8), 2)),
  'temperature': ((), number(())),
}
ADAM = {'b1': 0.8, 'b2': 0.95, 'eps': 1e-3}


def drawn(rng, shapes):
  return {
    name: rng.normal(size=shape).astype(np.float32) * 10.0 ** rng.uniform(-2, 1)
    for name, shape in shapes.items()
  }


def test_follows_the_reference():
  """Weights of norms and biases do not decay."""
  rng = np.random.default_rng(0)
  shapes = {name: shape for name, (shape, _) in LEAVES.items()}
  start, *grads = (drawn(rng, shapes) for _ in range(5))
  tx = optax_mp.adam_mini(
    1e-2, blocks=optimizers.adam_mini_blocks(4), weight_decay=0.1, **ADAM
  )
  slow = {}
  for name, (_, labels) in LEAVES.items():
    decay = 0.0 if 'Norm' in name or 'bias' in name else 0.1
    slow[name] = reference.AdamMini(labels, lr=1e-2, decay=decay, **ADAM)
  wanted = {name: np.float64(w) for name, w in start.items()}
  ours = recorded.run(tx, jax.tree.map(jnp.asarray, start), grads)
  for (params, state), g in zip(ours, grads, strict=True):
    for name, w in wanted.items():
      wanted[name] = slow[name].step(w, np.float64(g[name]))
      nu = optax.tree.get(state, 'nu')[name]
      assert nu.size == slow[name].v.size, name
      recorded.assert_state(nu, slow[name].v.reshape(nu.shape))
    # kind: derived, relative to weights of up to ten.
    chex.assert_trees_all_close(params, wanted, rtol=1e-6, atol=1e-6)


def test_row_by_row_it_is_subset_norm():
  """At a learning rate eta, Subset-Norm's at eta sqrt(k). kind: derived."""
  rng = np.random.default_rng(1)
  shape = (12, 5)
  start, *grads = (rng.normal(size=shape).astype(np.float32) for _ in range(6))
  mini = optax_mp.adam_mini(
    1e-2, blocks=lambda path, leaf: Blocks((-1,)), eps=1e-30
  )
  norm = optax_mp.adamw_sn(1e-2 * 5**0.5, eps=1e-30)
  for (ours, _), (theirs, _) in zip(
    recorded.run(mini, jnp.asarray(start), grads),
    list(recorded.run(norm, jnp.asarray(start), grads)),
    strict=True,
  ):
    np.testing.assert_allclose(ours, theirs, rtol=0.0, atol=recorded.PARAMS)


def test_coordinate_by_coordinate_it_is_adamw():
  """kind: derived."""
  rng = np.random.default_rng(2)
  start, *grads = (rng.normal(size=(4, 6)).astype(np.float32) for _ in range(4))
  mini = optax_mp.adam_mini(
    1e-2, blocks=lambda path, leaf: Blocks(), weight_decay=0.1
  )
  plain = optax.adamw(1e-2, weight_decay=0.1)
  (*_, (ours, _)) = recorded.run(mini, jnp.asarray(start), grads)
  (*_, (theirs, _)) = recorded.run(plain, jnp.asarray(start), grads)
  np.testing.assert_allclose(ours, theirs, rtol=0.0, atol=recorded.PARAMS)


def test_a_stack_is_its_layers():
  """kind: derived, sums in another order."""
  rng = np.random.default_rng(3)
  shapes = {
    'qkv/kernel': (3, 6, 24),
    'norm/scale': (3, 6),
    'mlp/kernel': (3, 6, 4),
    'mlp/bias': (3, 4),
  }
  g = jax.tree.map(jnp.asarray, drawn(rng, shapes))
  tx = optimizers.scale_by_adam_mini(blocks=optimizers.adam_mini_blocks(4))
  together, _ = tx.update(g, tx.init(g))
  for i in range(3):
    layer = jax.tree.map(lambda x, i=i: x[i], g)
    apart, _ = tx.update(layer, tx.init(layer))
    chex.assert_trees_all_close(
      apart, jax.tree.map(lambda x, i=i: x[i], together), rtol=1e-5
    )


def test_blocks_of_the_example():
  """One for each head of its queries and keys, in all layers."""
  config = train_gpt.Config(layers=2, width=16, heads=4, context=8)
  _, params = jax.eval_shape(
    lambda: nnx.split(train_gpt.GPT(config, nnx.Rngs(0)))
  )
  params = nnx.to_pure_dict(params)
  tx = optimizers.scale_by_adam_mini(blocks=optimizers.adam_mini_blocks(4))
  nu = jax.eval_shape(tx.init, params).nu
  shapes = jax.tree.map(lambda x: x.shape, nu)
  assert shapes['bytes']['embedding'] == (256,)
  assert shapes['norm'] == {'scale': (), 'bias': (16,)}
  block = shapes['blocks']
  assert block['qkv'] == {'kernel': (2, 8 + 16), 'bias': (2, 48)}
  assert block['widen'] == {'kernel': (2, 64), 'bias': (2, 64)}
  assert block['norm_1'] == {'scale': (2,), 'bias': (2, 16)}


def shape(*lengths):
  return jax.ShapeDtypeStruct(lengths, jnp.float32)


def test_fewer_heads_of_keys_and_values():
  blocks = optimizers.adam_mini_blocks(4, 2)
  assert blocks('q/kernel', shape(6, 8)).runs == ((4, 2),)
  assert blocks('k/kernel', shape(6, 4)).runs == ((2, 2),)
  assert blocks('qkv/kernel', shape(6, 16)).runs == ((6, 2), (4, 1))


def test_all_values_may_be_one_block():
  blocks = optimizers.adam_mini_blocks(4, whole_value=True)
  assert blocks('value/kernel', shape(6, 8)) == Blocks((-2, -1))
  assert blocks('value/kernel', shape(6, 4, 2)) == Blocks((-3, -2, -1))
  assert blocks('qkv/kernel', shape(6, 24)).runs == ((8, 2), (1, 8))
  assert blocks('query/kernel', shape(6, 8)).runs == ((4, 2),)


def test_as_many_layers_as_heads_are_a_stack():
  blocks = optimizers.adam_mini_blocks(4)
  assert blocks('out/kernel', shape(4, 8, 8)) == Blocks((-2,))
  assert blocks('out/kernel', shape(4, 2, 8)) == Blocks((-3, -2))


def test_bytes():
  """Exact; with the count left out."""
  params = {
    'query': {'kernel': jax.ShapeDtypeStruct((512, 256), jnp.bfloat16)},
    'mlp': {'kernel': jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)},
  }
  tx = optax_mp.adam_mini(1e-3, blocks=optimizers.adam_mini_blocks(8))
  plan = memory.plan(tx, params, gradients=None)
  size = 2 * 512 * 256
  assert plan.total_bytes == 2 * size + 4 * size + 4 * (8 + 512) + 4


@pytest.mark.parametrize(
  ('blocks', 'argument'),
  [
    (lambda path, leaf: (-1,), 'blocks'),
    (lambda path, leaf: Blocks((1,)), 'blocks'),
    (lambda path, leaf: Blocks((-3,)), 'blocks'),
    (lambda path, leaf: Blocks((-2,), ((4, 2),)), 'blocks'),
    (optimizers.adam_mini_blocks(4), 'num_heads'),
  ],
)
def test_errors_name_the_argument(blocks, argument):
  tx = optimizers.scale_by_adam_mini(blocks=blocks)
  with pytest.raises(ValueError, match=f'`{argument}`.*got'):
    tx.init({'query': {'kernel': jnp.zeros((4, 6))}})


def test_eps_of_0_is_refused():
  """A block without gradient would be 0 / 0."""
  with pytest.raises(ValueError, match='`eps`.*larger than 0.*got 0'):
    optax_mp.adam_mini(1e-3, blocks=lambda path, leaf: Blocks(), eps=0)


@pytest.mark.parametrize('name', ['num_heads', 'num_kv_heads'])
def test_heads_are_whole(name):
  make = functools.partial(optimizers.adam_mini_blocks, num_heads=4)
  with pytest.raises(ValueError, match=f'`{name}`.*got'):
    make(**{name: 0})
