# SPDX-License-Identifier: Apache-2.0
"""Which parameters a paper's method is for, and AdamW for the others."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from optax_mp.formats import _paths
from optax_mp.optimizers._core import _names
from optax_mp.optimizers._core import _trees

Matrices = Any | Callable[[optax.Params], Any] | None

_OTHER = _names.EMBEDDING, _names.HEAD, _names.NORM, _names.GAIN, _names.BIAS


def hidden_matrices(params: optax.Params) -> Any:
  """The weights that low-rank methods are for, as their papers use them.

  Args:
    params: a pytree of arrays, or of shapes.

  Returns:
    A tree of bools: True for leaves with two or more axes, unless a name on
    their path is that of an embedding (``*embed*``, ``*emb``, ``*token``,
    ``wte``, ``wpe``), a head (``head``, ``heads``, ``*_head``, ``lmhead``,
    ``logits``, ``*classifier``, ``unembed*``), a norm (``*norm*``, ``ln``,
    ``ln1``, ``ln_*``, ``*_ln``, ``scale``) or a ``*bias*``.

  **Caveats:** print it for your model. It goes by names, and kernels with more
  axes are stacks to the methods: Flax's attention keeps (in, heads, size),
  which is as many matrices (heads, size), and where the rank is not below their
  shorter side a low-rank state is larger than Adam's. Leave these out, with a
  function of your own, or give the method kernels with two axes.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_mp import optimizers
    >>> matrix = jnp.ones((8, 8))
    >>> params = {'qkv': {'kernel': matrix}, 'lm_head': {'kernel': matrix}}
    >>> optimizers.hidden_matrices(params)
    {'lm_head': {'kernel': False}, 'qkv': {'kernel': True}}
  """

  def is_hidden(path, leaf):
    names = _paths.path_str(path).split('/')
    return len(leaf.shape) > 1 and not _names.has(names, *_OTHER)

  return jax.tree_util.tree_map_with_path(is_hidden, params)


def alias(
  method: optax.GradientTransformation,
  step: optax.GradientTransformation,
  matrices: Matrices = None,
  other: optax.GradientTransformation | None = None,
  other_step: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """A whole optimizer: a method for some leaves, and another one for the rest.

  Args:
    method: scales gradients.
    step: decays weights and multiplies by the learning rate.
    matrices: a tree of bools like the parameters, or a function from them to
      one; None: ``method`` for all leaves.
    other: what scales gradients of the rest.
    other_step: and what makes steps of them; None: ``step``.

  Returns:
    A transformation, in float32 from gradient to update.
  """
  if not callable(matrices):
    _check_no_bool(matrices)
  whole = optax.chain(method, step)
  if matrices is None:
    return _trees.in_float32(whole)
  assert other is not None
  rest = optax.chain(other, step if other_step is None else other_step)

  def labels(params):
    chosen = matrices(params) if callable(matrices) else matrices
    _check_chosen(chosen, params)
    return jax.tree.map(lambda x: 'matrices' if x else 'others', chosen)

  return _trees.in_float32(
    optax.partition({'matrices': whole, 'others': rest}, labels)
  )


def own(adam_learning_rate: Any, learning_rate: Any) -> Any:
  """The learning rate of leaves that AdamW has: their own, if they have one."""
  return learning_rate if adam_learning_rate is None else adam_learning_rate


def with_rates(
  method: optax.GradientTransformation,
  other: optax.GradientTransformation,
  step: Callable[..., optax.GradientTransformation],
  learning_rates: tuple[Any, Any],
  decay: tuple[Any, Any],
  matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
  """As :func:`alias`, with one kind of step for both, each at its own rate.

  Args:
    method: scales gradients of ``matrices``.
    other: and those of the rest.
    step: of a learning rate and of ``decay``, such as
      ``_adam.decay_before_step``.
    learning_rates: of ``method`` and of ``other``, where None is the first.
    decay: of weights, and the mask of what decays.
    matrices: see :func:`alias`.

  Returns:
    A transformation.
  """
  rate, other_rate = learning_rates
  other_step = step(own(other_rate, rate), *decay)
  return alias(method, step(rate, *decay), matrices, other, other_step)


def _check_no_bool(chosen):
  """Refuses what ``inject_hyperparams`` makes of a function of parameters."""
  if chosen is not None and jax.tree_util.all_leaves([chosen]):
    raise ValueError(
      '`matrices` must be a tree of bools like the parameters, a function from '
      f'parameters to one, or None for all of them; got {chosen!r}. Under '
      '`optax.inject_hyperparams`, which calls functions as schedules, name it '
      'in `static_args`.'
    )


def _check_chosen(chosen, params):
  if not jax.tree_util.all_leaves([params]):
    _check_no_bool(chosen)
  try:
    jax.tree.map(lambda *_: None, chosen, params)
  except ValueError as error:
    raise ValueError(
      '`matrices` must be like the parameters that the optimizer sees; got '
      f'{jax.tree.structure(chosen)} for {jax.tree.structure(params)}. In '
      '`fused_step`, which shows it a part of them at a time, it must be a '
      'function.'
    ) from error
