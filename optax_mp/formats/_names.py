# SPDX-License-Identifier: Apache-2.0
"""Stored arrays carry the name of their format, in the name of a field.

Orbax, ``flax.serialization``, pickle and msgpack all keep the field names of a
NamedTuple, and most of them nothing else of it. The last field of a stored leaf
is therefore called ``scales__BlockInt_8_signed_sqrt_log_128_block_v2`` in a
state, and not ``scales``. A restore into a state of another format then fails
and shows both names, and ``update`` checks the name while it is traced. The
short name remains as an attribute, and ``isinstance`` works as before.
"""

from collections.abc import Mapping
import dataclasses
import functools
import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_mp.formats import _base

# The version of stored arrays. It increases when a change of a format would
# decode old codes to other values. Version 1 had no names.
VERSION = 2
_SEPARATOR = '__'
_FIELD = re.compile(rf'[a-z]+{_SEPARATOR}(\w+_v\d+)')
# Settings that only `encode` reads: they do not change how arrays decode.
_ENCODE_ONLY = ('rounding', 'stochastic_below', 'keep_nonzero')
# The formats whose names have been given out. Formats of one name decode alike.
_NAMED: dict[str, _base.Format] = {}
# Arrays of these dtypes hold their own values, whichever format stored them.
_PLAIN = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


@_base.Stored.register
class Alone(NamedTuple):
  """One array of codes from a format that stores nothing else."""

  codes: chex.Array


@functools.cache
def name_of(format: _base.Format) -> str:
  """The format's name: its class and all settings that ``decode`` reads.

  Args:
    format: a format. If it is no dataclass, the name is its class's name.

  Returns:
    Letters, digits and underscores, with the version at the end.
  """
  return f'{_words(format)}_v{VERSION}'


def named(format: _base.Format, stored: Any) -> Any:
  """A stored leaf, with the format's name in the name of its last field.

  Args:
    format: the format.
    stored: the result of its ``encode``, in arrays or ShapeDtypeStructs.

  Returns:
    A NamedTuple whose type is a subclass of the type of ``stored``. A lone
    float array of 16 or 32 bits gets no name: its dtype says all.
  """
  if not _base.is_stored(stored):
    if stored.dtype in _PLAIN:
      return stored
    stored = Alone(stored)
  name = name_of(format)
  _NAMED.setdefault(name, format)
  return _named_type(_plain_type(stored), name)._make(stored)


def nameless(stored: Any) -> Any:
  """A stored leaf as ``decode`` takes it: a lone array without its tuple."""
  return stored.codes if isinstance(stored, Alone) else stored


def name_in(stored: Any) -> str | None:
  """The name of the format that a stored leaf carries; None without a name.

  Args:
    stored: a NamedTuple, or the mapping that a library has made of it.
  """
  keys = (
    stored if isinstance(stored, Mapping) else getattr(stored, '_fields', ())
  )
  found = (_FIELD.fullmatch(str(key)) for key in keys)
  return next((match[1] for match in found if match), None)


def decoded(stored: Any) -> Any:
  """The values of a stored leaf in float32, to see which of them are finite.

  Args:
    stored: a stored leaf or an array.

  Returns:
    The values; ``stored`` itself if its type does not tell their shape, or has
    one more axis of a ``vmap``.
  """
  format = _NAMED.get(name_in(stored) or '')
  shape = getattr(stored, 'value_shape', None)
  if format is None or shape is None:
    return stored
  like = _base.stored_like(format, shape, jnp.dtype(jnp.float32))
  if [x.shape for x in jax.tree.leaves(like)] != [
    x.shape for x in jax.tree.leaves(stored)
  ]:
    return stored
  return format.decode(stored, jax.ShapeDtypeStruct(shape, jnp.float32))


def describe(stored: Any) -> str:
  """The format's name, or a note that it has no name; '' for an array."""
  if _base.is_stored(stored) or isinstance(stored, Mapping):
    return name_in(stored) or 'a format without a name'
  return ''


def hint(stored: Any) -> str:
  """The way out for a stored leaf without a format's name; '' with a name."""
  if name_in(stored):
    return ''
  return (
    ' If version 0.1.0 saved the state, which gave formats no names, '
    '`checkpoint.rebuild(tx, params, state, unnamed=True)` gives them.'
  )


def _words(value: Any, field: str = '') -> str:
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    words = [
      _words(getattr(value, f.name), f.name)
      for f in dataclasses.fields(value)
      if f.name not in _ENCODE_ONLY
    ]
    return '_'.join([type(value).__name__, *words])
  if isinstance(value, bool):
    return field if value else f'not_{field}'
  word = value if isinstance(value, (str, int, float)) else type(value).__name__
  return re.sub(r'\W+', '_', str(word)).replace(_SEPARATOR, '_')


def _plain_type(stored: Any) -> type:
  """The type that the format returned, before the name was added."""
  return getattr(type(stored), '_plain', type(stored))


@functools.cache
def _named_type(plain: Any, name: str) -> Any:
  """A subclass whose last field's name contains the format's name."""
  *others, last = plain._fields
  field = f'{last}{_SEPARATOR}{name}'

  def short(kwargs):
    return {last if key == field else key: x for key, x in kwargs.items()}

  def new(cls, *args, **kwargs):  # Flax restores by the names of fields
    return plain.__new__(cls, *args, **short(kwargs))

  namespace = {
    '__slots__': (),
    '__new__': new,
    '_replace': lambda self, **kwargs: plain._replace(self, **short(kwargs)),
    '__doc__': f'{plain.__doc__}\n\nThe last field names the format.',
    '__module__': __name__,
    '__reduce__': lambda self: (_restored, (plain, name, tuple(self))),
    '_fields': (*others, field),
    '_plain': plain,
    field: property(lambda self: self[-1]),
  }
  return type(f'{plain.__name__}[{name}]', (plain,), namespace)


def _restored(plain: Any, name: str, parts: tuple[Any, ...]) -> Any:
  """Unpickles a leaf, whose type is made at run time and cannot be imported."""
  return _named_type(plain, name)(*parts)
