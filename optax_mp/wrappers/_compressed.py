# SPDX-License-Identifier: Apache-2.0
"""The state of any optimizer, kept in any format."""

import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_mp import formats
from optax_mp._core import _finite
from optax_mp.formats import _boxed
from optax_mp.formats import _containers
from optax_mp.formats import _layout
from optax_mp.formats import _leaves
from optax_mp.formats import _names
from optax_mp.formats import _paths
from optax_mp.formats import _rule
from optax_mp.formats import _tree
from optax_mp.wrappers import _common
from optax_mp.wrappers import _moments
from optax_mp.wrappers import _passes


@_finite.Noted.register
class CompressedState(NamedTuple):
  """The inner state, its leaves stored as the rule says."""

  inner_state: optax.OptState  # leaves are arrays or formats' NamedTuples
  noise_count: chex.Array  # (), uint32: how often noise was drawn

  def values(self) -> optax.OptState:
    """The inner state; what a format stored is decoded."""
    return jax.tree.map(
      _names.decoded, self.inner_state, is_leaf=formats.is_stored
    )


def compressed(
  inner: optax.GradientTransformation,
  rule: formats.Rule,
  *,
  min_size: int = 4096,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps the state of an optimizer in a compact format between steps.

  **Stored:** each array s of the inner state in the format f that the rule
  gives it, else as it is. One step with gradient g and parameters x is

  .. math::
    u, s' = \mathrm{inner}(g, \mathrm{decode}_f(s), x), \qquad
    s \leftarrow \mathrm{encode}_f(s'),

  with g, s and x in float32 whatever their dtypes are outside, so the update u
  is that of the full-precision s'; what f loses counts from the next step on.

  Args:
    inner: any Optax transformation.
    rule: a format for every large floating-point array of the state; or a
      mapping from state field to format or None, ``{'mu': Split(8)}``; or a
      function ``(path, leaf) -> format or None``. See
      :func:`optax_mp.formats.encode_tree`. For second moments (``nu``
      and others, in the states of Optax and of this library) a signed format
      becomes unsigned: ``BlockInt(8)``, whose map is 'sqrt', becomes
      ``BlockInt(8, signed=False, map='sqrt')``. A signed one would turn small
      values into zeros, and optimizers divide by their roots.
    min_size: arrays with fewer values than this stay as they are, as integers
      do: there is nothing to save, and any array takes 512 bytes on a TPU.
    seed: for formats that round stochastically; two in one chain need two.

  Returns:
    A transformation whose updates have the dtype that Optax would give them.

  Raises:
    ValueError: if the rule is none; in ``init``, if it names a field without
      float arrays, or is for no array at all; in ``update``, if the state was
      stored by another rule or for other parameters.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optax_mp
    >>> tx = optax_mp.compressed(optax.adam(1e-3), optax_mp.formats.Split(8))
    >>> params = jnp.ones((64, 64))
    >>> state = tx.init(params)
    >>> updates, state = tx.update(2 * params, state, params)
    >>> mu = state.inner_state[0].mu
    >>> mu.high.dtype, mu.low.dtype, mu.high.nbytes + mu.low.nbytes
    (dtype(bfloat16), dtype('uint8'), 12288)

  **Savings:** Adam's moments take 6 bytes per parameter in ``Split(8)`` and 4
  in ``BFloat16('stochastic')``, instead of 8.

  **Caveats:** nearest rounding to bfloat16 freezes averages with decay 0.999.
  Under ``vmap`` every row has the same noise, unless ``update`` is given its
  number as ``layer=``. For formats with scales ``inner.update`` is called
  twice, once for the scales of new states and once for the rest, which saves a
  GPU from keeping them in float32; the compiler merges what is not stored. A
  callback inside it, or the ``value_fn`` of a line search, may therefore run
  twice a step: ``compressed`` is for optimizers that are arithmetic.
  ``optax.tree.map_params`` with further trees needs
  ``is_leaf=formats.is_stored``.

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2022 (states stored small, computed
    with in float32)
  """
  return keep_compressed(inner, rule, min_size, seed, may_do_nothing=False)


def keep_compressed(
  inner: optax.GradientTransformation,
  rule: formats.Rule,
  min_size: int,
  seed: int,
  may_do_nothing: bool,
  kept: re.Pattern[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """:func:`compressed`; a recipe may have small leaves only.

  Args:
    inner: see :func:`compressed`.
    rule: see there.
    min_size: see there.
    seed: see there.
    may_do_nothing: whether the rule may match nothing.
    kept: found in the path of a parameter, its state stays as it is.

  Returns:
    A transformation.
  """
  _rule.check_rule(rule)
  _common.check_min_size(min_size)
  inner, seed = _common.checked(inner, seed)

  def choices(like, params):
    paths = _paths.param_paths(params)
    return _rule.leaf_choices(like, rule, min_size, paths, kept)

  @_common.laid_out
  def build(params):
    with _leaves.named_on_failure(params, 'params'):
      state = inner.init(_common.to_float32(params))
    # Before as well: then scales and factors, which have other shapes, follow.
    state = _layout.lay_out(state, params)
    state = _common.not_constant(state)
    now = _common.noise_key(seed, jnp.uint32(0))
    decided = choices(state, params)
    stored = _tree.encode_leaves(state, _rule.formats_of(decided), now)
    return _rule.decided(stored, jax.tree.structure(state), decided)

  def init_fn(params):
    params = _leaves.checked(params, 'params')
    if jax.tree.leaves(params):  # `optax.tree.map_params` has none, nor groups
      like = _template(inner, params, 'params')
      chosen = _rule.formats_of(choices(like, params))
      _moments.check_wide(like, chosen)
      _moments.check_zeros(like, params, chosen)
      _moments.warn_unless_kept(_paths.param_paths(params), kept)
      if not may_do_nothing:
        _rule.check_fields(like, rule, _paths.param_paths(params))
        if all(format is None for format in chosen):
          raise ValueError(_nothing(like, rule, min_size))
    # The noise of `init` and of the first step differ.
    return CompressedState(build(params), jnp.ones((), jnp.uint32))

  def update_fn(updates, state, params=None, **extra_args):
    _common.check_state(state, CompressedState)
    updates, params = _leaves.checked_updates(updates, params)
    if params is not None:
      treedef = jax.tree.structure(updates)
      _paths.flatten_like(treedef, params, 'params', 'updates')
      _leaves.check_shapes(updates, params)
    # Of the parameters, as in `init`: an integer's gradient may be a float.
    given = updates if params is None else params
    like = _template(inner, given, 'updates')
    found = _tree.flatten_state(
      jax.tree.structure(like),
      state.inner_state,
      hint=_leaves.why_no_gradient(updates),
    )
    chosen = _rule.formats_of(choices(like, updates), found)

    def advance(stored):
      decoded = _tree.decode_leaves(stored, like, chosen, 'state')
      with _leaves.named_on_failure(updates, 'updates'):
        new_updates, inner_state = inner.update(
          _common.to_float32(updates),
          decoded,
          None if params is None else _common.to_float32(params),
          **extra_args,
        )
      return new_updates, _leaves.cast_like(inner_state, like)

    first = _passes.fit_ahead(advance, state.inner_state, like, chosen, updates)
    new_updates, inner_state = advance(state.inner_state)
    # The first pass is checked, if there is one: XLA:GPU would keep what it
    # shares with a check of the second one.
    old, new = first[:2] if first else (state.inner_state, inner_state)
    _finite.note(new, lambda: _tree.decode_leaves(old, like, chosen, 'state'))
    layer = extra_args.get('layer')
    now = _common.noise_key(seed, state.noise_count, layer)
    scales = first.scales if first else None
    stored = _tree.encode_leaves(inner_state, chosen, now, scales)
    stored = _containers.in_containers(stored, state.inner_state, like)
    new_updates = _cast_like(new_updates, updates, params)
    return new_updates, CompressedState(stored, state.noise_count + 1)

  tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
  return _boxed.transparent(tx)


def _template(
  inner: optax.GradientTransformation, tree: Any, argument: str
) -> Any:
  """Structure, shapes and dtypes of the inner state for float32 parameters."""

  def float32(x):
    narrow = x.dtype in (jnp.bfloat16, jnp.float16)
    return jax.ShapeDtypeStruct(x.shape, jnp.float32 if narrow else x.dtype)

  with _leaves.named_on_failure(tree, argument):
    return jax.eval_shape(inner.init, jax.tree.map(float32, tree))


def _cast_like(new_updates: Any, updates: Any, params: Any) -> Any:
  """Updates in the dtype that gradient and parameter promote to, as Optax's."""

  def cast(u, gradient, param):
    if not _rule.is_float(u):
      return u
    with jax.numpy_dtype_promotion('standard'):
      return u.astype(jnp.promote_types(gradient.dtype, param.dtype))

  params = updates if params is None else params
  return jax.tree.map(cast, new_updates, updates, params)


def _nothing(like: Any, rule: Any, min_size: int) -> str:
  shapes = sorted({str(leaf.shape) for leaf in jax.tree.leaves(like)})
  return (
    f'`rule` matches no leaf: got {rule!r} with min_size={min_size} for a '
    f'state with arrays of shape {", ".join(shapes) or "(none)"}. Lower '
    '`min_size`, change the rule, or leave out `compressed`.'
  )
