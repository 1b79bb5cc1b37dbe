# SPDX-License-Identifier: Apache-2.0
"""Which parameters a method is for, by name, and how that can go wrong."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_mp
from optax_mp import backward
from optax_mp import optimizers
import stacks

# What a parameter is, by its path: '', a weight of a hidden layer, or else.
PATHS = {
  'mlp/kernel': '',
  'MultiHeadAttention_0/query/kernel': '',
  'token_mixing/kernel': '',
  'member/kernel': '',
  'upscale/kernel': '',
  'wte/embedding': 'embedding',
  'wpe': 'embedding',
  'tok_emb/weight': 'embedding',
  'pos_emb': 'embedding',
  'embed_tokens/weight': 'embedding',
  'cls_token': 'embedding',
  'mask_token': 'embedding',
  'lm_head/kernel': 'head',
  'head/kernel': 'head',
  'LayerNorm_0/weight': 'norm',
  'ln/w': 'norm',
  'ln1/w': 'norm',
  'lnf/w': 'norm',
  'ln_f/w': 'norm',
  'final_ln/weight': 'norm',
  'scaling/scale': 'gain',
  'q_bias': 'bias',
  'in_proj_bias': 'bias',
  'relative_attention_bias/weight': 'bias',
}


def tree_of(path, leaf):
  for name in reversed(path.split('/')):
    leaf = {name: leaf}
  return leaf


@pytest.mark.parametrize(('path', 'kind'), PATHS.items())
def test_one_idea_of_what_a_name_means(path, kind):
  """Of the methods for hidden weights and of Adam-mini's blocks and decay."""
  params = tree_of(path, jnp.ones((8, 8)))
  (hidden,) = jax.tree.leaves(optimizers.hidden_matrices(params))
  assert hidden is (not kind)
  blocks = optimizers.adam_mini_blocks(1)(path, jax.tree.leaves(params)[0])
  by_kind = {
    'bias': optimizers.Blocks(),
    'embedding': optimizers.Blocks((-1,)),
    'norm': optimizers.Blocks((-1,)),
  }
  if kind in by_kind:
    assert blocks == by_kind[kind]
  elif kind in ('', 'head'):
    assert blocks.axes == (-2,)
  tx = optax_mp.adam_mini(
    1.0, blocks=optimizers.adam_mini_blocks(1), weight_decay=0.5
  )
  zeros = jax.tree.map(jnp.zeros_like, params)
  (update,) = jax.tree.leaves(tx.update(zeros, tx.init(params), params)[0])
  is_decayed = kind not in ('norm', 'bias')
  assert (update == (-0.5 if is_decayed else 0.0)).all()


def test_few_axes_are_no_matrix():
  params = {'kernel': jnp.ones((3,)), 'gate': jnp.ones(())}
  assert not any(jax.tree.leaves(optimizers.hidden_matrices(params)))


PARAMS = {'kernel': jnp.ones((4, 3)), 'other': jnp.ones((4, 3))}


@pytest.mark.parametrize(
  'matrices', [False, True, jnp.zeros((), bool), lambda params: False]
)
def test_a_single_bool_is_refused(matrices):
  """``inject_hyperparams`` calls functions that it takes for schedules."""
  with pytest.raises(ValueError, match='`matrices`.*got .*`static_args`'):
    optax_mp.galore(0.1, matrices=matrices).init(PARAMS)


def test_a_single_array_may_have_one():
  tx = optax_mp.galore(0.1, rank=2, matrices=optimizers.hidden_matrices)
  assert jax.tree.leaves(tx.init(jnp.ones((4, 3))))


def test_a_tree_of_other_parameters_is_refused():
  """As in a step inside the backward pass, which wants a function."""
  rest, stack, _ = stacks.model()
  chosen = {'kernel': True, 'bias': False}
  tx = optax_mp.galore(0.1, rank=2, matrices=chosen)
  assert jax.tree.leaves(jax.eval_shape(tx.init, stack))
  fused = backward.fused_step(stacks.loss_fn, stacks.block_fn, tx)
  with pytest.raises(ValueError, match='`matrices`.*got.*must be a function'):
    jax.eval_shape(fused.init, rest, stack)


def test_a_tree_may_be_cut_by_a_mask():
  """Or stop above the leaves; groups have no place for what others have."""
  tx = optax.masked(
    optax_mp.galore(0.1, rank=2, matrices={'kernel': True, 'other': False}),
    {'kernel': True, 'other': False},
  )
  assert jax.tree.leaves(jax.eval_shape(tx.init, PARAMS))
  tx = optax_mp.galore(0.1, rank=2, matrices={'a': True, 'b': False})
  assert jax.tree.leaves(jax.eval_shape(tx.init, {'a': PARAMS, 'b': PARAMS}))
