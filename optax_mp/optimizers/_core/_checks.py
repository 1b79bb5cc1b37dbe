# SPDX-License-Identifier: Apache-2.0
"""Hyperparameters are checked where they are Python numbers, once."""

from typing import Any

from optax_mp.formats import _base


def positive(**values: Any) -> None:
  """Raises a ValueError for a number that is 0 or less."""
  for name, value in values.items():
    if _is_number(value) and not value > 0:
      raise ValueError(f'`{name}` must be larger than 0; got {value!r}.')


def not_negative(**values: Any) -> None:
  """Raises a ValueError for a number below 0."""
  for name, value in values.items():
    if _is_number(value) and not value >= 0:
      raise ValueError(f'`{name}` must be 0 or larger; got {value!r}.')


def decays(**values: Any) -> None:
  """Raises a ValueError for the decay of an average outside [0, 1)."""
  for name, value in values.items():
    if _is_number(value) and not 0 <= value < 1:
      raise ValueError(
        f'`{name}` must be from 0 to 1, without 1; got {value!r}.'
      )


def whole(**values: Any) -> None:
  """Raises a ValueError for what is no integer of 1 or more.

  They fix shapes or branches, so an array is refused, too: under
  ``optax.inject_hyperparams`` they belong in ``static_args``.
  """
  for name, value in values.items():
    _base.check_static(value, name)
    if not _base.is_integer(value) or value < 1:
      raise ValueError(
        f'`{name}` must be an integer, 1 or more; got {value!r}.'
      )


def one_of(known: Any, **values: Any) -> None:
  """Raises a ValueError for a name that is not known."""
  for name, value in values.items():
    _base.check_static(value, name)
    if value not in known:
      raise ValueError(
        f'`{name}` must be one of {", ".join(map(repr, known))}; got {value!r}.'
      )


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float)
