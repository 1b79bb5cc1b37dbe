# SPDX-License-Identifier: Apache-2.0
"""What some formats can do beyond encode and decode."""

from typing import Any, Protocol, TypeGuard

import chex

from optax_mp.formats import _base


class Fitted(_base.Format, Protocol):
  """A format that looks at an array as a whole before it rounds its values.

  ``encode`` takes what ``fit`` returned, so that an optimizer's wrapper can
  compute new values twice, first for what blocks share and then for the codes,
  instead of keeping them in between: XLA:GPU would keep them, in float32.
  """

  def fit(self, x: chex.Array) -> Any:
    """What groups of values share; None for nothing."""
    ...

  def encode(
    self, x: chex.Array, key: chex.PRNGKey | None = None, scales: Any = None
  ) -> Any:
    """Stores ``x`` with the scales of ``fit``; None: with its own."""
    ...


def fit(format: _base.Format, x: chex.Array) -> Any:
  """``format.fit(x)``; None for a format that has nothing to fit."""
  return format.fit(x) if is_fitted(format) else None


def is_fitted(format: Any) -> TypeGuard[Fitted]:
  """Whether a format is a :class:`Fitted` one."""
  return hasattr(format, 'fit')


def encode(
  format: _base.Format, x: chex.Array, key: chex.PRNGKey | None, scales: Any
) -> Any:
  """``format.encode``, with what ``fit`` returned."""
  if scales is None or not is_fitted(format):
    return format.encode(x, key)
  return format.encode(x, key, scales)


def note(format: Any, shape: tuple[int, ...]) -> str:
  """What a format says of arrays of a shape; empty if it has nothing to say."""
  return format.note(shape) if hasattr(format, 'note') else ''
