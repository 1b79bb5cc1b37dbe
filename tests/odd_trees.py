# SPDX-License-Identifier: Apache-2.0
"""Trees of parameters as programs have them: strategies for hypothesis."""

import functools
from typing import Any, NamedTuple

from flax import linen as nn
from flax import nnx
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax

SHAPES = (
  (64, 128),  # as many values as the default `min_size`, twice
  (8, 128),
  (33, 17),
  (5, 3),
  (2, 16, 24),
  (3, 3, 2, 8),
  (2, 1, 3, 1, 4),
  (256,),
  (7,),
  (1,),
  (),
  (1, 1),
  (0,),
  (0, 5),
  (5, 0),
  (2, 0, 128),
)
DTYPES = (
  *(jnp.bfloat16,) * 4,
  *(jnp.float32,) * 3,
  *(jnp.float16,) * 2,
  jnp.int32,
  jnp.bool,
  jnp.uint8,
)
# Some are names of fields of states, or would be two keys once joined.
NAMES = ('kernel', 'bias', 'mu', 'embed', 'a/b', '0')


class Layer(NamedTuple):
  kernel: Any
  nu: Any


class Tree(NamedTuple):
  """Parameters, and their gradients."""

  params: Any
  grads: Any
  frozen: bool = False  # whether it has a key that somebody must freeze


def frozen(tx):
  """``tx``, which does not see typed keys."""

  def label(x):
    return 'frozen' if is_key(x) else 'trained'

  groups = {'trained': tx, 'frozen': optax.set_to_zero()}
  return optax.partition(groups, lambda tree: jax.tree.map(label, tree))


def is_key(x):
  dtype = getattr(x, 'dtype', jnp.float32)
  return jnp.issubdtype(dtype, jax.dtypes.prng_key)


@functools.cache
def array(shape, dtype):
  return jnp.ones(shape, dtype)


def _variable(x, names):
  variable = nnx.Param(x)
  if names:  # not when it is made: then Flax asks for a mesh
    variable.set_metadata('out_sharding', names)
  return variable


@st.composite
def arrays(draw):
  x = array(draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES)))
  names = tuple(
    draw(st.sampled_from((None, 'rows', 'columns'))) for _ in x.shape
  )
  kind = draw(st.integers(0, 7))
  if kind == 0:
    return nn.Partitioned(x, names=names)
  if kind == 1:
    return nn.LogicallyPartitioned(x, names=names)
  if kind == 2:
    return _variable(x, names if draw(st.booleans()) else None)
  return np.asarray(x) if kind == 3 else x


def _containers(children):
  return st.one_of(
    st.dictionaries(st.sampled_from(NAMES), children, min_size=1, max_size=3),
    st.lists(children, min_size=1, max_size=3),
    st.lists(children, min_size=1, max_size=2).map(tuple),
    st.builds(Layer, children, children),
  )


_LEAVES = st.one_of(
  arrays(), arrays(), arrays(), st.sampled_from((None, 1.5, 2, True))
)


_OFTEN = st.sampled_from((True, True, False))


@st.composite
def trees(draw):
  """Parameters, and gradients of the dtypes that programs have for them."""
  params = draw(_containers(st.recursive(_LEAVES, _containers, max_leaves=2)))
  wide, as_floats = draw(st.booleans()), draw(st.booleans())
  keys = jax.random.split(jax.random.key(0), 2)
  keyed = draw(st.integers(0, 5)) == 0
  if keyed:
    params = {'model': params, 'key': draw(st.sampled_from((keys, keys[0])))}

  def gradient(p):
    if is_key(p):
      return p
    dtype = jnp.asarray(p).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
      return array(jnp.shape(p), jnp.float32 if as_floats else dtype)
    if isinstance(p, float):
      return 0.5
    return array(p.shape, jnp.float32 if wide else dtype)

  return Tree(params, jax.tree.map(gradient, params), keyed and draw(_OFTEN))
