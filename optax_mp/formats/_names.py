# SPDX-License-Identifier: Apache-2.0
"""What is stored says what it is: the format's name is the name of a field.

Orbax, ``flax.serialization``, pickle and msgpack all keep the names of fields
and nothing else of a NamedTuple. So the last field of what a format stored is
called ``scales__BlockInt_8_signed_sqrt_log_128_block_v2`` in a state, and not
``scales``: whoever restores it into a state of another format is told so by
name, and ``update`` sees it while tracing. The old name remains as an
attribute, and ``isinstance`` still tells the kind.
"""

from collections.abc import Mapping
import dataclasses
import functools
import re
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp

from optax_mp.formats import _base

# Of the meaning of what formats store. 1 had no names; it is increased by a
# change after which old codes would decode to other values.
VERSION = 2
_SEPARATOR = '__'
_FIELD = re.compile(rf'[a-z]+{_SEPARATOR}(\w+_v\d+)')
# Settings that only `encode` reads: what they stored decodes alike.
_ENCODE_ONLY = ('rounding', 'stochastic_below', 'keep_nonzero')
# Arrays of these dtypes mean their own values, whatever stored them.
_PLAIN = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


@_base.Stored.register
class Alone(NamedTuple):
  """One array of codes from a format that stores nothing else."""

  codes: chex.Array


@functools.cache
def name_of(format: _base.Format) -> str:
  """The format's name: its class and all settings that ``decode`` reads.

  Args:
    format: a format. One that is no dataclass is named after its class.

  Returns:
    Letters, digits and underscores, with the version at the end.
  """
  return f'{_words(format)}_v{VERSION}'


def named(format: _base.Format, stored: Any) -> Any:
  """What ``format`` stored, with the format's name in its last field.

  Args:
    format: the format.
    stored: what its ``encode`` returned, in arrays or ShapeDtypeStructs.

  Returns:
    A NamedTuple of a type that is a subclass of the old one. A float array of
    16 or 32 bits stays alone: its dtype says all.
  """
  if not _base.is_stored(stored):
    if stored.dtype in _PLAIN:
      return stored
    stored = Alone(stored)
  return _named_type(_plain_type(stored), name_of(format))._make(stored)


def nameless(stored: Any) -> Any:
  """What the format's ``decode`` takes: a lone array is no tuple there."""
  return stored.codes if isinstance(stored, Alone) else stored


def name_in(stored: Any) -> str | None:
  """The name that something stored carries; None if it has no name.

  Args:
    stored: a NamedTuple, or the mapping that a library has made of one.
  """
  keys = (
    stored if isinstance(stored, Mapping) else getattr(stored, '_fields', ())
  )
  found = (_FIELD.fullmatch(str(key)) for key in keys)
  return next((match[1] for match in found if match), None)


def describe(stored: Any) -> str:
  """The name, or a word on why there is none; nothing for an array."""
  if _base.is_stored(stored) or isinstance(stored, Mapping):
    return name_in(stored) or 'a format without a name'
  return ''


def hint(stored: Any) -> str:
  """The way out for a state whose formats have no names; else nothing."""
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
  """The type that a format returned, before it got a name."""
  return getattr(type(stored), '_plain', type(stored))


@functools.cache
def _named_type(plain: Any, name: str) -> Any:
  """A subclass whose last field has the format's name in its own."""
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
  """Unpickles: types that were made at run time have no name to import."""
  return _named_type(plain, name)(*parts)
