# SPDX-License-Identifier: Apache-2.0
"""What a format is: one way to store one array of floats.

A format is a frozen dataclass with two methods. Three worked cases, for the
float32 value x = 1.001:

* ``BFloat16()`` stores the one array it needs: bfloat16 1.0. Decoding gives
  1.0; the 0.001 is gone.
* ``Split(16)`` stores a :class:`HighLow`: bfloat16 1.0 and, in uint16, the 16
  bits that rounding removed. Decoding gives 1.001 to the last bit.
* ``ErrorFeedback(BFloat16(), BFloat16())`` stores a ``Feedback``: bfloat16 1.0
  and the error in bfloat16 as well, 0.00099945. Decoding gives 1.00099945.

To write one's own, write these two methods; nothing needs registering but the
NamedTuple of arrays that ``encode`` returns, if it returns more than one array.
"""

import abc
import dataclasses
import functools
import math
import numbers
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import chex
import jax
import jax.numpy as jnp


class Stored(abc.ABC):  # noqa: B024, nothing to implement: it is a mark
  """Marks the NamedTuples of arrays in which a format keeps one array.

  A virtual base class, since a NamedTuple can have no other: decorate it with
  ``@Stored.register``. The NamedTuple holds arrays only, no static metadata, so
  that Orbax and ``flax.serialization`` save it like any other part of a state.
  """


@Stored.register
class HighLow(NamedTuple):
  """A float32 array cut in two. ``high.shape == low.shape == x.shape``."""

  high: chex.Array  # x.shape, bfloat16 or float16: the visible half
  low: chex.Array  # x.shape, 8- or 16-bit integer: what rounding removed


@runtime_checkable
class Format(Protocol):
  """How one array of floats is stored.

  Under ``jit`` the compiler may treat a cast down and up again as the identity,
  on NVIDIA GPUs it does, and then ``x - decode(encode(x))`` is 0. So ``decode``
  reads integer bits (``lax.bitcast_convert_type``) wherever it undoes a
  rounding; a test reads the compiled programs.
  """

  def encode(self, x: chex.Array, key: chex.PRNGKey | None = None) -> Any:
    """Stores ``x``.

    Args:
      x: floats of any shape; arithmetic is done in float32.
      key: a typed or raw PRNG key; formats that round stochastically need it,
        the others ignore it.

    Returns:
      One array or a NamedTuple of arrays registered with :class:`Stored`.
    """
    ...

  def decode(self, stored: Any, like: jax.ShapeDtypeStruct) -> chex.Array:
    """Gives the array back, with the shape and dtype of ``like``."""
    ...


def is_stored(x: Any) -> bool:
  """True for a leaf that a format keeps in several arrays; for ``is_leaf=``.

  Args:
    x: any node of a pytree.

  Returns:
    Whether ``x`` is one of the NamedTuples that formats store arrays in.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from optax_mp import formats
    >>> stored = formats.Split(8).encode(jnp.ones(3))
    >>> formats.is_stored(stored), formats.is_stored(stored.high)
    (True, False)
    >>> len(jax.tree.leaves([stored, stored], is_leaf=formats.is_stored))
    2
  """
  return isinstance(x, Stored)


def bits_per_value(format: Format | None, shape: tuple[int, ...]) -> float:
  """Bits that ``format`` needs for each value of a float32 array.

  Counts the bits of each dtype: an int4 has 4, although its ``nbytes`` says 8.

  Args:
    format: a format, or None for plain float32.
    shape: the array's shape; formats with scales need more for small arrays.

  Returns:
    Bits per value, scales and residuals included; 0 for an empty array.

  Examples:
    >>> from optax_mp import formats
    >>> formats.bits_per_value(formats.Split(8), (64, 64))
    24.0
    >>> formats.bits_per_value(None, (64, 64))
    32.0
  """
  size = math.prod(shape)
  if size == 0:
    return 0.0
  dtype = jnp.dtype(jnp.float32)
  if format is None:
    return float(dtype_bits(dtype))
  stored = stored_like(format, shape, dtype)
  return sum(map(array_bits, jax.tree.leaves(stored))) / size


@functools.cache
def stored_like(format: Format, shape: Any, dtype: Any) -> Any:
  """Structure, shapes and dtypes of what ``format`` stores of an array."""
  x = jax.ShapeDtypeStruct(shape, dtype)
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(format.encode, x, key)


def array_bits(array: Any) -> int:
  """Bits of an array or ShapeDtypeStruct, from its dtype and shape."""
  return math.prod(array.shape) * dtype_bits(array.dtype)


def dtype_bits(dtype: Any) -> int:
  """Bits of one value of ``dtype``; ``itemsize`` would count int4 as 8."""
  if jnp.issubdtype(dtype, jax.dtypes.prng_key):
    # Typed keys hide how many words they have.
    key = jax.ShapeDtypeStruct((), dtype)
    return array_bits(jax.eval_shape(jax.random.key_data, key))
  dtype = jnp.dtype(dtype)
  if dtype == jnp.bool_:
    return 8
  if jnp.issubdtype(dtype, jnp.integer):
    return jnp.iinfo(dtype).bits
  parts = 2 if jnp.issubdtype(dtype, jnp.complexfloating) else 1
  return parts * jnp.finfo(dtype).bits


def check_format(value: Any, argument: str) -> None:
  """Raises a ValueError that names ``argument`` unless value is a format."""
  try:
    hash(value)  # it is a static argument of compiled functions
    is_format = isinstance(value, Format)
  except TypeError:
    is_format = False
  if isinstance(value, type) or not is_format:
    raise ValueError(
      f'`{argument}` must be a format such as `formats.Split(8)`; got '
      f'{value!r}. A format is a frozen dataclass with the methods `encode` '
      'and `decode`.'
    )


def check_choice(value: Any, argument: str, choices: tuple[Any, ...]) -> None:
  """Raises a ValueError that names ``argument`` unless value is a choice.

  Args:
    value: what the caller passed.
    argument: its name, for the message.
    choices: the values allowed, all strings or all integers.
  """
  check_static(value, argument)
  right_kind = isinstance(value, str)
  if not isinstance(choices[0], str):
    right_kind = is_integer(value)
  if not right_kind or value not in choices:
    raise ValueError(f'`{argument}` must be one of {choices}; got {value!r}.')


def is_integer(value: Any) -> bool:
  """True for the integers of Python and NumPy; a bool is none."""
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_static(value: Any, argument: str) -> None:
  """Raises a ValueError if a setting is an array, traced or not."""
  if isinstance(value, jax.Array):
    raise ValueError(
      f'`{argument}` must be a Python value, since it decides what the program '
      f'is; got {value!r}. Under `optax.inject_hyperparams` name it in '
      '`static_args`, with the others that its documentation names.'
    )


def check_rounding(format: Any) -> None:
  """Raises a ValueError unless ``format.rounding`` is one of the two."""
  check_choice(format.rounding, 'rounding', ('nearest', 'stochastic'))


@dataclasses.dataclass(frozen=True)
class Alone:
  """The settings of formats that keep 16 bits and no residual."""

  rounding: Literal['nearest', 'stochastic'] = 'nearest'

  def __post_init__(self):
    check_rounding(self)


@dataclasses.dataclass(frozen=True)
class WithResidual:
  """The settings of formats that keep 16 bits and a residual."""

  residual_bits: Literal[16, 8] = 16
  rounding: Literal['nearest', 'stochastic'] = 'nearest'

  def __post_init__(self):
    check_choice(self.residual_bits, 'residual_bits', (16, 8))
    check_rounding(self)


def check_key(key: chex.PRNGKey | None, format: Format) -> chex.PRNGKey:
  """Returns ``key``, or raises a ValueError that says who needs one."""
  if key is None:
    raise ValueError(
      f'`key` is None, but {format} rounds stochastically and draws noise from '
      "it; pass a `jax.random.key`, or use rounding='nearest'."
    )
  return key
