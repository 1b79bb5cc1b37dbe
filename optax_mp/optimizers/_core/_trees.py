# SPDX-License-Identifier: Apache-2.0
"""What every optimizer does alike: float32 arithmetic, one leaf at a time.

A state keeps trees like the parameters, a tree a field, as Optax's states do. A
leaf may have any shape there, and where a field has nothing for a parameter it
holds ``NOTHING``, which is no array.
"""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import optax

from optax_mp.formats import _boxed
from optax_mp.formats import _layout
from optax_mp.formats import _leaves
from optax_mp.formats import _paths

NOTHING = optax.MaskedNode()


def in_float32(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """``inner`` on float32 gradients and parameters, whatever they come in.

  Args:
    inner: whose ``init`` makes float32 arrays for parameters of any dtype.

  Returns:
    The transformation; its updates have the dtype that gradient and parameter
    promote to, as Optax's have, and its state lies where the parameters lie.
  """
  inner = optax.with_extra_args_support(inner)

  @jax.jit  # which else may put zeros on one device
  def build(params):
    with _leaves.named_on_failure(params, 'params'):
      return _layout.lay_out(inner.init(params), params)

  def init_fn(params):
    return build(_leaves.checked(params, 'params', trains_all=True))

  def update_fn(updates, state, params=None, **extra_args):
    updates, params = _leaves.checked_updates(updates, params, trains_all=True)
    wide = None
    if params is not None:
      _leaves.check_shapes(updates, params)
      wide = optax.tree.cast(params, jnp.float32)
    with _leaves.named_on_failure(updates, 'updates', params is None):
      new_updates, state = inner.update(
        optax.tree.cast(updates, jnp.float32), state, wide, **extra_args
      )
    params = updates if params is None else params
    return jax.tree.map(_cast_like, new_updates, updates, params), state

  tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
  return _boxed.transparent(tx)


def _cast_like(u: chex.Array, gradient: chex.Array, param: chex.Array):
  with jax.numpy_dtype_promotion('standard'):
    return u.astype(jnp.promote_types(gradient.dtype, param.dtype))


def map_leaves(
  fn: Callable[..., tuple[Any, ...]],
  updates: optax.Updates,
  state: Sequence[Any],
  *others: Any,
) -> tuple[Any, ...]:
  """Applies ``fn(g, *parts, *more) -> (update, *new_parts)`` leaf by leaf.

  Args:
    fn: a function of one leaf. A part is the subtree that a tree of the state
      has at that leaf: an array or any other pytree.
    updates: gradients.
    state: the trees of the state that ``fn`` takes and returns.
    *others: trees that it takes only, such as parameters; None is None for all
      leaves.

  Returns:
    The tree of updates, and the trees of ``state`` after this step.
  """
  leaves, treedef = jax.tree.flatten(updates)
  if not leaves:  # a group of `optax.partition` may be empty
    return updates, *state
  trees = [
    [None] * len(leaves) if tree is None else treedef.flatten_up_to(tree)
    for tree in (*state, *others)
  ]
  results = [fn(*parts) for parts in zip(leaves, *trees, strict=True)]
  return tuple(treedef.unflatten(tree) for tree in zip(*results, strict=True))


def zeros(p: chex.Array) -> chex.Array:
  """Float32 zeros shaped like a parameter, and sharded like it."""
  return jnp.zeros_like(p, dtype=jnp.float32)


def zeros_along(p: chex.Array, axes: Sequence[int], *after: int) -> chex.Array:
  """Float32 zeros along some axes of a parameter, and sharded like those.

  Args:
    p: the parameter.
    axes: which of its axes, negative or not, in increasing order.
    *after: lengths of further axes, which are not sharded.

  Returns:
    An array of shape ``(*(p.shape[i] for i in axes), *after)``.
  """
  shape = (*(p.shape[i] for i in axes), *after)
  others = sorted(set(range(p.ndim)) - {i % p.ndim for i in axes})
  sharding = getattr(jax.typeof(p), 'sharding', None)
  # On a mesh with explicit axes.
  if isinstance(sharding, NamedSharding) and any(sharding.spec):
    specs = (*sharding.spec, *[None] * (p.ndim - len(sharding.spec)))
    spec = PartitionSpec(*(specs[i] for i in axes), *[None] * len(after))
    x = jnp.zeros(shape, jnp.float32, device=NamedSharding(sharding.mesh, spec))
    if not jax.typeof(x).sharding.mesh.empty:
      return x
    # From JAX 0.12 on, a traced constant is on no mesh unless one was set. A
    # sharded axis cannot be indexed here, so that the other axes are reduced.
    part = jnp.max(p, others, initial=0)
  elif not p.size:
    return jnp.zeros(shape, jnp.float32)
  else:
    x, part = jnp.zeros(shape, jnp.float32), jnp.asarray(p)
    for i in reversed(others):
      part = lax.index_in_dim(part, 0, i, keepdims=False)
  part = lax.broadcast_in_dim(part, shape, range(part.ndim))
  return _layout.lay_out_like(x, part)


def sharded_along(
  x: chex.Array, p: chex.Array, axes: Sequence[int | None]
) -> chex.Array:
  """``x`` with each axis sharded like one of ``p``, on an explicit mesh.

  Some operations demand it there. Elsewhere the compiler decides.

  Args:
    x: an array.
    p: another.
    axes: for each axis of ``x`` one of ``p``, or None: not sharded.

  Returns:
    The array.
  """
  now, specs = jax.typeof(x).sharding.spec, jax.typeof(p).sharding.spec
  wanted = PartitionSpec(*(None if i is None else specs[i] for i in axes))
  if wanted == now or not (any(wanted) or any(now)):
    return x
  return jax.sharding.reshard(x, wanted)


def check_params(params: optax.Params | None) -> None:
  """Raises a ValueError where ``update`` was called without parameters."""
  if params is None:
    raise ValueError(
      'You are using a transformation that requires the current value of '
      'parameters, but you are not passing `params` when calling `update`.'
    )


def stack_axes(p: chex.Array) -> range:
  """The axes before the last two: each index of them has a matrix."""
  return range(p.ndim - 2)


def leaf_keys(
  updates: optax.Updates,
  rng_key: chex.PRNGKey,
  index: chex.Numeric,
  layer: chex.Array | None = None,
) -> Any:
  """A key for each leaf, for one draw.

  By path, so that draws do not depend on what else is in the tree.

  Args:
    updates: the tree.
    rng_key: of the state, (2,) uint32.
    index: the number of the draw.
    layer: in a step inside the backward pass, the number of a layer.

  Returns:
    A tree of typed keys.
  """
  key = jax.random.wrap_key_data(rng_key, impl='threefry2x32')
  if layer is not None:
    key = jax.random.fold_in(key, layer + 1)  # 0 is for leaves in no stack

  def own(path, _):
    own_key = jax.random.key_data(_paths.leaf_key(key, path))
    own_key = jax.random.wrap_key_data(own_key, impl='threefry2x32')
    return jax.random.fold_in(own_key, index)

  return jax.tree_util.tree_map_with_path(own, updates)


def increment(count: chex.Array) -> chex.Array:
  """One more, unless that overflows."""
  return jnp.asarray(optax.safe_increment(count))


def raw_key(seed: int) -> chex.PRNGKey:
  """The key that a state keeps for a seed: (2,) uint32, not a typed key."""
  return jax.random.key_data(jax.random.key(seed, impl='threefry2x32'))


def refreshes(count: chex.Array, gap: int) -> chex.Array:
  """Whether the step that follows ``count`` others makes a new projector."""
  return lax.rem(count, jnp.int32(gap)) == 0
