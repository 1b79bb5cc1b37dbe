# SPDX-License-Identifier: Apache-2.0
"""Rules: which leaf of a state is kept in which format."""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp

from optax_mp.formats import _base
from optax_mp.formats import _fitted
from optax_mp.formats import _names
from optax_mp.formats import _paths
from optax_mp.formats import _squares

_ByPath: TypeAlias = Callable[[str, Any], _base.Format | None]
Rule: TypeAlias = (
  _base.Format | Mapping[str, _base.Format | _ByPath | None] | _ByPath
)


class Choice(NamedTuple):
  """The decision of a rule for one floating-point leaf."""

  path: str  # the path as rules see it
  shape: tuple[int, ...]
  format: _base.Format | None  # the format in a new state
  note: str  # why the leaf is not stored as one might expect, or empty
  others: tuple[_base.Format, ...] = ()  # formats that older states may have


@dataclasses.dataclass(frozen=True)
class Either:
  """A format for new states, and other formats that older states may have.

  A recipe takes it if a hyperparameter decides the format. A state that was
  made with another value of that hyperparameter keeps its format.
  """

  format: _base.Format
  others: tuple[_base.Format, ...]

  def encode(self, x: Any, key: Any = None) -> Any:
    """Stores ``x`` in the format for new states."""
    return self.format.encode(x, key)

  def decode(self, stored: Any, like: Any) -> Any:
    """Gives the array back that ``encode`` stored."""
    return self.format.decode(stored, like)


# JAX knows this context, so functions that were traced without it are traced
# again.
recording = jax.make_user_context(False)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['state'],
  meta_fields=['treedef', 'choices'],
)
@dataclasses.dataclass(frozen=True)
class Decided:
  """A state and the decisions of a rule for it, while they are recorded.

  ``memory.plan`` and checkpoints record them in a trace of ``init``. Everywhere
  else a state consists of arrays alone.
  """

  state: Any
  treedef: Any  # of the state before formats stored its leaves
  choices: tuple[Choice | None, ...]


def decided(state: Any, treedef: Any, choices: list[Choice | None]) -> Any:
  """The state, together with the choices while they are recorded."""
  if not recording.value:
    return state
  return Decided(state, treedef, tuple(choices))


def leaf_formats(
  tree: Any, rule: Rule, min_size: int = 0
) -> list[_base.Format | None]:
  """The format of each leaf of ``tree``, in the order of the leaves."""
  return formats_of(leaf_choices(tree, rule, min_size))


def formats_of(
  choices: list[Choice | None], stored: list[Any] | None = None
) -> list[_base.Format | None]:
  """The format of each leaf; None for leaves that stay as they are.

  Args:
    choices: the decisions of a rule.
    stored: the stored leaves, if there is a state already.
  """
  if stored is None:
    return [choice.format if choice else None for choice in choices]
  return [
    None if choice is None else _format_in(x, choice)
    for choice, x in zip(choices, stored, strict=True)
  ]


def _format_in(stored: Any, choice: Choice) -> _base.Format | None:
  """The choice's format that a stored leaf names; by default the new one."""
  name = _names.name_in(stored)
  known = (f for f in choice.others if _names.name_of(f) == name)
  return next(known, choice.format)


def leaf_choices(
  tree: Any,
  rule: Rule,
  min_size: int = 0,
  params: Collection[_paths.Path] = (),
  kept: re.Pattern[str] | None = None,
) -> list[Choice | None]:
  """The decision for each leaf of ``tree``, in the order of the leaves.

  Args:
    tree: a state of arrays or ShapeDtypeStructs.
    rule: see :func:`encode_tree`.
    min_size: leaves with fewer values, or without floats, stay as they are.
    params: paths of the parameters, whose own fields are no state fields. Given
      them, second moments get formats without signs (see ``_squares``).
    kept: a pattern. If a parameter's path has it, its leaves stay as they are.

  Returns:
    A choice for each floating-point leaf. None for other leaves, and for leaves
    that the optimizer itself keeps in a format.
  """
  check_rule(rule)
  variables = _paths.are_variables(params)
  choices: list[Choice | None] = []
  kept_already = _inside_stored(tree)
  for path, leaf, (state, param) in _leaves(tree, params):
    if not is_float(leaf) or path in kept_already:
      choices.append(None)
      continue
    format, note, others = None, f'fewer than min_size={min_size} values', ()
    name = _paths.path_str(path, variables)
    if is_float(leaf, min_size):
      if kept and kept.search(_paths.path_str(param, variables)):
        note = f'kept by {kept.pattern!r}'
      else:
        format = _choose(rule, name, leaf, _paths.fields(state))
        if isinstance(format, Either):
          format, others = format.format, format.others
        if params and _squares.are_squares(state, tree):
          format, *others = map(_squares.without_signs, (format, *others))
        note = _fitted.note(format, leaf.shape) if format else 'by the rule'
    choices.append(Choice(name, leaf.shape, format, note, tuple(others)))
  return choices


def check_fields(
  tree: Any, rule: Any, params: Collection[_paths.Path] = ()
) -> None:
  """Raises a ValueError if a mapping names a field without float arrays."""
  if not isinstance(rule, Mapping):
    return
  kept_already = _inside_stored(tree)
  known = {
    field
    for path, leaf, (state, _) in _leaves(tree, params)
    if is_float(leaf) and path not in kept_already
    for field in _paths.fields(state)
  }
  if unknown := set(rule) - known:
    raise ValueError(
      f'`rule` names the state fields {sorted(map(str, unknown))}; got a state '
      f'with float arrays in {sorted(known)}. Use those names, or a function '
      '(path, leaf) -> format.'
    )


def check_rule(rule: Any) -> None:
  """Raises a ValueError unless ``rule`` is one of the three kinds of rule."""
  if isinstance(rule, Mapping):
    for field, format in rule.items():
      if format is not None and not _is_by_path(format):
        _base.check_format(format, f'rule[{field!r}]')
  elif not _is_by_path(rule):
    _base.check_format(rule, 'rule')


def _is_by_path(rule: Any) -> TypeGuard[_ByPath]:
  return callable(rule) and not isinstance(rule, type)


def is_float(leaf: Any, min_size: int = 0) -> bool:
  """Whether a leaf is floating-point and has at least ``min_size`` values."""
  floating = jnp.issubdtype(leaf.dtype, jnp.floating)
  return floating and math.prod(leaf.shape) >= min_size


def _inside_stored(tree: Any) -> set[_paths.Path]:
  """The paths of all arrays inside of stored leaves."""
  nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_base.is_stored)
  return {
    (*path, *below)
    for path, node in nodes
    if _base.is_stored(node)
    for below, _ in jax.tree_util.tree_leaves_with_path(node)
  }


def _leaves(
  tree: Any, params: Collection[_paths.Path]
) -> list[tuple[_paths.Path, Any, tuple[_paths.Path, _paths.Path]]]:
  """Each path, its leaf, and the path cut into (state's, parameter's) part."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  parts = _paths.split_paths([path for path, _ in leaves], params)
  return [(path, x, parts[path]) for path, x in leaves]


def _choose(
  rule: Rule | None, name: str, leaf: Any, fields: list[str]
) -> _base.Format | None:
  """The rule's format for one leaf, from its path and its state fields."""
  if isinstance(rule, Mapping):
    named = [field for field in fields if field in rule]
    return _choose(rule[named[0]], name, leaf, fields) if named else None
  if rule is None or isinstance(rule, _base.Format):
    return rule
  format = rule(name, leaf)
  if format is not None:
    _base.check_format(format, f'rule({name!r}, ...)')
  return format
