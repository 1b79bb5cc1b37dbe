# SPDX-License-Identifier: Apache-2.0
"""Which blocks Adam-mini has in a transformer, by names and shapes."""

from collections.abc import Callable
import re

import jax

from optax_mp.optimizers._core import _checks
from optax_mp.optimizers._core import _names
from optax_mp.optimizers._core import _subsets

Blocks = _subsets.Blocks

# Whole names on a path.
_FUSED = re.compile(r'.*qkv.*|c_attn|in_proj', re.IGNORECASE)
_QUERY = re.compile(r'(.*_)?query|q|q_proj|wq', re.IGNORECASE)
_KEY = re.compile(r'(.*_)?key|k|k_proj|wk', re.IGNORECASE)
_VALUE = re.compile(r'(.*_)?value|v|v_proj|wv', re.IGNORECASE)
_MATRIX = re.compile(r'kernel|weight|w')


def adam_mini_blocks(
  num_heads: int,
  num_kv_heads: int | None = None,
  *,
  whole_value: bool = False,
) -> Callable[[str, jax.ShapeDtypeStruct], Blocks]:
  r"""Blocks of a Flax transformer: what :func:`adam_mini` needs to know.

  By names on a leaf's path, the first that fits:

  ======================================  =================================
  ``*bias*``                              a block a coordinate, as in Adam
  a norm                                  one block
  an embedding                            a block a row, that is a token
  ``*qkv*``, ``c_attn``, ``in_proj``      a block a head of queries and keys,
                                          then one an output neuron of values
  ``*query``, ``q``, ``q_proj``, ``wq``   a block a head; keys likewise
  other ``kernel``, ``weight``, ``w``     a block an output neuron, that is a
                                          column
  all others                              one block along the last axis
  ======================================  =================================

  Norms and embeddings are what :func:`hidden_matrices` takes for them.

  Kernels are (in, out), those of attention also (in, heads, size) and (heads,
  size, out), as in ``flax.nnx.MultiHeadAttention``. In one that has queries,
  keys and values, each of them has its heads one after the other. Leading
  axes, of a stack, are kept.

  Args:
    num_heads: of queries.
    num_kv_heads: of keys and values, if there are fewer.
    whole_value: one block for all values, which the authors advise for runs of
      less than ten to twenty thousand steps.

  Returns:
    A function ``(path, leaf) -> Blocks``.

  Raises:
    ValueError: for a number of heads below 1; from the function, for a kernel
      that has no such heads.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_mp import optimizers
    >>> blocks = optimizers.adam_mini_blocks(num_heads=4)
    >>> blocks('qkv/kernel', jax.ShapeDtypeStruct((64, 192), jnp.float32)).runs
    ((8, 16), (64, 1))
  """
  kv_heads = num_heads if num_kv_heads is None else num_kv_heads
  _checks.whole(num_heads=num_heads, num_kv_heads=kv_heads)
  known = ((_QUERY, num_heads), (_KEY, kv_heads), (_VALUE, kv_heads))

  def rule(path, leaf):
    names, shape = path.split('/'), leaf.shape
    if _names.has(names, _names.BIAS) or not shape:
      return Blocks()
    is_matrix = len(shape) > 1 and _MATRIX.fullmatch(names[-1])
    if _names.has(names, _names.NORM, _names.EMBEDDING) or not is_matrix:
      return Blocks((-1,))
    if _names.has(names, _FUSED):
      size = _head_size(path, shape, num_heads + 2 * kv_heads)
      values = (1, kv_heads * size) if whole_value else (kv_heads * size, 1)
      return Blocks((-2,), ((num_heads + kv_heads, size), values))
    for pattern, heads in known:
      if _names.has(names, pattern):
        kind = 'head' if pattern is not _VALUE else 'neuron'
        whole = whole_value and pattern is _VALUE
        return _of_heads(path, shape, heads, 'all' if whole else kind)
    # (heads, size, out) and not a stack (L, in, out) of as many layers.
    split = len(shape) > 2 and shape[-3] == num_heads
    if split and num_heads * shape[-2] == shape[-1]:
      return Blocks((-3, -2))
    return Blocks((-2,))

  return rule


def _of_heads(path, shape, heads, kind):
  """Blocks of a kernel (in, heads, size) or (in, heads * size)."""
  if len(shape) > 2 and shape[-2] == heads:
    return Blocks(
      {'head': (-3, -1), 'neuron': (-3,), 'all': (-3, -2, -1)}[kind]
    )
  size = _head_size(path, shape, heads)
  if kind == 'head':
    return Blocks((-2,), ((heads, size),))
  return Blocks((-2,) if kind == 'neuron' else (-2, -1))


def _head_size(path, shape, heads):
  if shape[-1] % heads:
    raise ValueError(
      f'`num_heads` must divide the last axis of {path}; got {heads} heads, '
      f'all counted, and shape {shape}. For other shapes write a function '
      '`(path, leaf) -> Blocks`.'
    )
  return shape[-1] // heads
