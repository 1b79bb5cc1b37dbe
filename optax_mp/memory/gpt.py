# SPDX-License-Identifier: Apache-2.0
"""A GPT of any size, as shapes, and one training step of it.

GPT-2's architecture (Radford et al., `Language Models are Unsupervised
Multitask Learners`, 2019): learned positions, layer norms before each part, the
embedding's matrix also reads out. Layers are stacked and scanned, activations
recomputed, matrix products in bfloat16.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

Params = dict[str, Any]

_HEAD = 64  # width of an attention head, in GPT-2 of every size


@dataclasses.dataclass(frozen=True)
class Size:
  """Of a GPT and of what one device gets to train on.

  Examples:
    >>> from optax_mp.memory import gpt
    >>> f'{gpt.Size(layers=12, width=768, vocabulary=50257).num_params:,}'
    '124,439,808'
  """

  layers: int
  width: int
  vocabulary: int = 50304  # GPT-2's 50257, made a multiple of 128
  context: int = 1024
  batch: int = 1  # sequences a step, of each device

  def __post_init__(self):
    if self.width % _HEAD:
      raise ValueError(
        f'`width` must be a multiple of {_HEAD}, the width of a head; got '
        f'{self.width}.'
      )
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value < 1:
        raise ValueError(f'`{field.name}` must be positive; got {value}.')

  @property
  def num_params(self) -> int:
    """Parameters of the model."""
    return sum(x.size for x in jax.tree.leaves(shapes(self, jnp.bfloat16)))


def shapes(size: Size, dtype: Any) -> Params:
  """The parameters of a model, as ``ShapeDtypeStruct``.

  Args:
    size: of the model.
    dtype: of the parameters.

  Returns:
    `layers` has a leading axis of ``size.layers``.
  """
  w = size.width

  def of(*shape):
    return jax.ShapeDtypeStruct(shape, dtype)

  def stack(*shape):
    return of(size.layers, *shape)

  return {
    'embedding': of(size.vocabulary, w),
    'positions': of(size.context, w),
    'norm': {'scale': of(w), 'bias': of(w)},
    'layers': {
      'norm_1': {'scale': stack(w), 'bias': stack(w)},
      'qkv': {'kernel': stack(w, 3 * w), 'bias': stack(3 * w)},
      'project': {'kernel': stack(w, w), 'bias': stack(w)},
      'norm_2': {'scale': stack(w), 'bias': stack(w)},
      'widen': {'kernel': stack(w, 4 * w), 'bias': stack(4 * w)},
      'narrow': {'kernel': stack(4 * w, w), 'bias': stack(w)},
    },
  }


def tokens(size: Size, num_devices: int = 1) -> jax.ShapeDtypeStruct:
  """The shape of a batch: inputs and, shifted by one, targets."""
  shape = (size.batch * num_devices, size.context + 1)
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def loss_fn(
  params: Params, tokens: jax.Array, axis: str | None = None
) -> jax.Array:
  """Mean cross-entropy of the next token.

  Args:
    params: of `shapes`, in bfloat16.
    tokens: int32 (batch, context + 1).
    axis: of the mesh, over which the batch is cut.

  Returns:
    A float32 scalar.
  """

  @jax.checkpoint
  def layer(x, p):
    return block(p, x, axis), None

  rest, stack = halves(params)
  return loss_around(
    rest, lambda x: jax.lax.scan(layer, x, stack)[0], tokens, axis
  )


def halves(params: Params) -> tuple[Params, Params]:
  """What is outside the layers, and their stack, as ``backward`` wants them.

  Args:
    params: of `shapes`.

  Returns:
    Both, for ``backward.fused_step(gpt.loss_around, gpt.block, tx)``.
  """
  rest = {name: part for name, part in params.items() if name != 'layers'}
  return rest, params['layers']


def loss_around(
  rest: Params,
  blocks: Callable[[jax.Array], jax.Array],
  tokens: jax.Array,
  axis: str | None = None,
) -> jax.Array:
  """Mean cross-entropy of the next token, the layers being called.

  Args:
    rest: parameters outside the layers; of any float dtype.
    blocks: runs all layers.
    tokens: int32 (batch, context + 1).
    axis: of the mesh, over which the batch is cut.

  Returns:
    A float32 scalar.
  """
  rest = _low(rest)
  inputs, targets = tokens[:, :-1], tokens[:, 1:]
  x = blocks(_cut(rest['embedding'][inputs] + rest['positions'], axis))
  x = _norm(x, rest['norm'])
  logits = jnp.einsum(
    'btw,vw->btv', x, rest['embedding'], preferred_element_type=jnp.float32
  )
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return losses.mean()


def block(p: Params, x: jax.Array, axis: str | None = None) -> jax.Array:
  """Attention and a feed-forward layer, each added to what comes in.

  Args:
    p: parameters of one layer, of any float dtype.
    x: bfloat16 (batch, context, width).
    axis: of the mesh, over which the batch is cut.

  Returns:
    The same shape.
  """
  p = _low(p)
  qkv = _linear(_norm(x, p['norm_1']), p['qkv'])
  q, k, v = jnp.split(qkv.reshape(*x.shape[:2], -1, _HEAD), 3, axis=2)
  mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
  x += _linear(mixed.reshape(x.shape), p['project'])
  wide = jax.nn.gelu(_linear(_norm(x, p['norm_2']), p['widen']))
  return _cut(x + _linear(wide, p['narrow']), axis)


def _low(params: Params) -> Params:
  return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def _cut(x: jax.Array, axis: str | None) -> jax.Array:
  # Else XLA may gather activations, where FSDP gathers weights.
  spec = jax.sharding.PartitionSpec(axis)
  return jax.lax.with_sharding_constraint(x, spec) if axis else x


def _linear(x: jax.Array, p: Params) -> jax.Array:
  return x @ p['kernel'] + p['bias']


def _norm(x: jax.Array, p: Params) -> jax.Array:
  normal = jax.nn.standardize(x.astype(jnp.float32), epsilon=1e-5)
  return normal.astype(x.dtype) * p['scale'] + p['bias']


def make_step(
  tx: optax.GradientTransformation, axis: str | None = None
) -> Callable[..., Any]:
  """A training step; donate the first two arguments.

  Args:
    tx: the optimizer.
    axis: of the mesh, over which the batch is cut.

  Returns:
    ``step(params, state, tokens) -> (params, state, loss)``. Of float32
    parameters it makes a bfloat16 copy to work with, and its gradients.
  """

  def step(params, state, tokens):
    working = optax.tree.cast(params, jnp.bfloat16)
    loss, gradients = jax.value_and_grad(loss_fn)(working, tokens, axis)
    gradients = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, params)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss

  return step


def in_backward(fused: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """The step of ``backward``, of the same arguments as that of `make_step`.

  Args:
    fused: ``backward.fused_step(gpt.loss_around, gpt.block, tx)``.

  Returns:
    ``init(params) -> state`` and a step; donate its first two arguments.
  """

  def step(params, state, tokens):
    rest, stack, state, loss = fused(*halves(params), state, tokens)
    return rest | {'layers': stack}, state, loss

  return lambda params: fused.init(*halves(params)), step
