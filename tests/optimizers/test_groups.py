# SPDX-License-Identifier: Apache-2.0
"""Which parameters a method is for, by name, and how that can go wrong."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_mp
from optax_mp import backward
from optax_mp import optimizers
from optax_mp.optimizers._core import _names
import stacks

# What a parameter is, by its path; None: a weight of a hidden layer.
PATHS = {
  'mlp/kernel': None,
  'MultiHeadAttention_0/query/kernel': None,
  'token_mixing/kernel': None,
  'member/kernel': None,
  'upscale/kernel': None,
  'wte/embedding': _names.EMBEDDING,
  'wpe': _names.EMBEDDING,
  'tok_emb/weight': _names.EMBEDDING,
  'pos_emb': _names.EMBEDDING,
  'embed_tokens/weight': _names.EMBEDDING,
  'cls_token': _names.EMBEDDING,
  'mask_token': _names.EMBEDDING,
  'lm_head/kernel': _names.HEAD,
  'head/kernel': _names.HEAD,
  'LayerNorm_0/weight': _names.NORM,
  'ln/w': _names.NORM,
  'ln1/w': _names.NORM,
  'lnf/w': _names.NORM,
  'ln_f/w': _names.NORM,
  'final_ln/weight': _names.NORM,
  'scaling/scale': _names.GAIN,
  'q_bias': _names.BIAS,
  'in_proj_bias': _names.BIAS,
  'relative_attention_bias/weight': _names.BIAS,
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
  assert hidden is (kind is None)
  blocks = optimizers.adam_mini_blocks(1)(path, jax.tree.leaves(params)[0])
  by_kind = {
    _names.BIAS: optimizers.Blocks(),
    _names.EMBEDDING: optimizers.Blocks((-1,)),
    _names.NORM: optimizers.Blocks((-1,)),
  }
  if kind in by_kind:
    assert blocks == by_kind[kind]
  elif kind in (None, _names.HEAD):
    assert blocks.axes == (-2,)
  tx = optax_mp.adam_mini(
    1.0, blocks=optimizers.adam_mini_blocks(1), weight_decay=0.5
  )
  zeros = jax.tree.map(jnp.zeros_like, params)
  (update,) = jax.tree.leaves(tx.update(zeros, tx.init(params), params)[0])
  is_decayed = kind not in (_names.NORM, _names.BIAS)
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
