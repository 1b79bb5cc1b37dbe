# SPDX-License-Identifier: Apache-2.0
"""Takes leaves that are no float arrays as Optax does, or refuses them.

A parameter may be a Python number, an integer or bool array, an empty array, or
a typed key that other parts of a chain leave alone. Functions, strings and
other contents of an unfiltered module are refused by name, and so is a
parameter without a gradient. If an optimizer fails on a tree with unusual
leaves, the error names them.
"""

from collections.abc import Iterator
import contextlib
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_mp.formats import _paths

_FREEZE = (
  'Freeze such leaves with `optax.partition`, or train the other ones alone.'
)


def checked(tree: Any, argument: str, trains_all: bool = False) -> Any:
  """The tree, with arrays for Python numbers; a ValueError for other leaves.

  Args:
    tree: parameters or gradients.
    argument: the caller's name for them.
    trains_all: whether to refuse typed keys and float0 arrays, which have no
      gradients, because no part of the optimizer leaves them alone.
  """

  def check(path, x):
    if _is_array(x):
      if trains_all and (is_key(x) or x.dtype == jax.dtypes.float0):
        raise ValueError(
          f'`{argument}` has {_text(x)} at {_paths.path_str(path)!r}, got an '
          f'optimizer that trains all leaves. {_FREEZE}'
        )
      # JAX keeps NumPy's float64 as float32, unless told otherwise.
      is_wide = isinstance(x, (np.ndarray, np.generic)) and (
        jnp.issubdtype(x.dtype, jnp.inexact)
        and x.dtype != jax.dtypes.canonicalize_dtype(x.dtype)
      )
      return jnp.asarray(x) if is_wide else x
    if isinstance(x, numbers.Number):
      return jnp.asarray(x)
    raise ValueError(
      f'`{argument}` must be a tree of arrays; got a {type(x).__name__} at '
      f'{_paths.path_str(path)!r}. Take the arrays alone, as '
      '`equinox.filter(model, equinox.is_inexact_array)` does.'
    )

  return jax.tree_util.tree_map_with_path(check, tree)


def checked_updates(
  updates: Any, params: Any, trains_all: bool = False
) -> tuple[Any, Any]:
  """Gradients and parameters; a ValueError if a parameter has no gradient.

  Args:
    updates: the gradients.
    params: the parameters, or None.
    trains_all: see :func:`checked`.
  """
  updates = checked(updates, 'updates', trains_all)
  if params is None:
    return updates, None
  params = checked(params, 'params', trains_all)
  if why := why_no_gradient(updates, params):
    raise ValueError(why)
  return updates, params


def why_no_gradient(updates: Any, params: Any = None) -> str:
  """Says which parameter has None for a gradient; '' if all have gradients.

  Args:
    updates: the gradients.
    params: the parameters. Without them any None counts as a missing gradient.
  """
  nodes = jax.tree_util.tree_leaves_with_path(updates, is_leaf=_is_none)
  missing = [path for path, x in nodes if x is None]
  leaves = jax.tree_util.tree_leaves_with_path(params) if missing else []
  for path in missing:
    known = [x for whole, x in leaves if whole[: len(path)] == path]
    if known or params is None:
      of = ''.join(f' for the parameter {p.dtype}{p.shape}' for p in known[:1])
      return (
        f'`updates` has no gradient at {_paths.path_str(path)!r}; got None{of}.'
        ' Pass zeros, or leave the parameter out of both trees, as '
        '`equinox.partition` does.'
      )
  return ''


def check_shapes(updates: Any, params: Any) -> None:
  """Raises a ValueError unless gradients are shaped like the parameters."""
  pairs, treedef = jax.tree_util.tree_flatten_with_path(params)
  gradients = _paths.flatten_like(treedef, updates, 'updates', 'params')
  for (path, param), gradient in zip(pairs, gradients, strict=True):
    if not hasattr(gradient, 'shape') or gradient.shape != param.shape:
      shape = getattr(gradient, 'shape', f'of a {type(gradient).__name__}')
      raise ValueError(
        f'`updates` has the shape {shape} at {_paths.path_str(path)!r}, got '
        f'parameters of {param.shape}. Pass the gradients of these parameters.'
      )


@contextlib.contextmanager
def named_on_failure(
  tree: Any, argument: str, nones: bool = False
) -> Iterator[None]:
  """Within this context an optimizer's error names the tree's unusual leaves.

  Optax's Muon divides by the sides of an empty matrix, and Adam computes with a
  typed key as with numbers. Their own errors name neither leaf nor reason.

  Args:
    tree: the parameters or gradients that the optimizer was given.
    argument: the caller's name for the tree.
    nones: whether a None in the tree is unusual, too.
  """
  try:
    yield
  except jax.errors.JAXTypeError:  # a value is not known while tracing
    raise
  except Exception as error:
    unusual = _unusual(tree, nones)
    if not unusual or str(error).startswith('`'):  # an error of our own
      raise
    reason = str(error).splitlines()[0][:200] if str(error) else ''
    raise ValueError(
      f'`{argument}` has leaves that not every optimizer takes: '
      f'{", ".join(unusual[:4])}; got {type(error).__name__} from this one '
      f'({reason}). {_FREEZE}'
    ) from error


def cast_like(state: Any, like: Any) -> Any:
  """A new state, with the dtypes that the state had in ``init``.

  In the first step Optax turns some states of integer and bool parameters,
  whose gradients mean nothing, into floats. Our states keep their dtypes.

  Args:
    state: the new state of an inner transformation.
    like: the state from its ``init``, or the shapes and dtypes of that state.
  """

  def cast(x, old):
    return x if x.dtype == old.dtype or is_key(old) else x.astype(old.dtype)

  if jax.tree.structure(state) != jax.tree.structure(like):
    return state  # the transformation itself changes the structure
  return jax.tree.map(cast, state, like)


def is_float(x: Any) -> bool:
  """Whether an array has a floating-point dtype; a typed key does not."""
  return jnp.issubdtype(x.dtype, jnp.floating)


def is_key(x: Any) -> bool:
  """Whether an array holds typed keys, which are no numbers."""
  return jnp.issubdtype(x.dtype, jax.dtypes.extended)


def _is_array(x: Any) -> bool:
  """Whether JAX takes ``x`` for an array; it refuses arrays of strings."""
  if not (hasattr(x, 'dtype') and hasattr(x, 'shape')):
    return False
  if x.dtype == jax.dtypes.float0:
    return True
  kinds = (jnp.number, jnp.bool, jax.dtypes.extended)
  try:
    return any(jnp.issubdtype(x.dtype, kind) for kind in kinds)
  except TypeError:  # a dtype of another library
    return False


def _unusual(tree: Any, nones: bool) -> list[str]:
  """Describes the leaves that optimizers may not have been written for."""
  is_leaf = _is_none if nones else None
  nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
  return [
    f'{_paths.path_str(path)!r} ({what})'
    for path, x in nodes
    if (what := _why_unusual(x))
  ]


def _is_none(x: Any) -> bool:
  return x is None


def _why_unusual(x: Any) -> str:
  if x is None:
    return 'None'
  if is_key(x) or x.dtype == jax.dtypes.float0:
    return _text(x)
  text = f'{x.dtype}{x.shape}'
  if 0 in x.shape:
    return f'the empty array {text}'
  try:  # small floats and integers do not promote to other dtypes
    with jax.numpy_dtype_promotion('standard'):
      jnp.promote_types(x.dtype, jnp.float32)
  except ValueError:
    return text
  return ''


def _text(x: Any) -> str:
  """Describes a leaf that has no gradient."""
  if is_key(x):
    return f'the typed key {x.dtype}{x.shape}'
  return f'the float0 gradient {x.shape} of an integer'
