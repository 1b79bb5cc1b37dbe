# SPDX-License-Identifier: Apache-2.0
"""8 and 4 bits, one scale per block: the formats of low-bit optimizers."""

import dataclasses
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_mp.formats import _base
from optax_mp.formats import _blocks
from optax_mp.formats import _dynamic
from optax_mp.formats import _grids
from optax_mp.formats import _groups
from optax_mp.formats import _log
from optax_mp.formats import _maps
from optax_mp.formats import _octaves

_MAPS = ('sqrt', 'sqrt_log', 'log', 'dynamic', 'softsign', 'linear')


@_base.Stored.register
class Block(NamedTuple):
  """Codes, and the scales of their blocks. ``codes.shape == x.shape``."""

  codes: chex.Array  # x.shape, 8- or 4-bit integer or 8-bit float
  # (..., R, C / block_size) or (..., R): float32, or uint32 for a grid of two
  # numbers; with scale='rank1' a float32 vector an axis.
  scales: Any

  @property
  def value_shape(self) -> tuple[int, ...]:
    """The shape of the array that is stored."""
    return self.codes.shape


@dataclasses.dataclass(frozen=True)
class BlockInt:
  r"""Keeps an array in 8- or 4-bit integers, with one scale per block.

  **Stored:** ``Block(codes, scales)``: 1 or 1/2 byte per value, and 4 bytes per
  block, 1/32 of a byte per value. With s the largest magnitude of a block and
  v(n) the value of code n in the map,

  .. math::
    \mathrm{encode}(x) = \mathrm{sign}(x) \,\arg\min_n |v(n) - |x|/s|,
    \qquad \mathrm{decode} = \mathrm{sign}\; v(n)\, s,

  or, rounded stochastically, one of the two codes around x, with probabilities
  that make the mean of the decoded value x ('log': the mean of its logarithm).

  =========== ======================================== ====================
  map         v(n), N the largest code                 of
  =========== ======================================== ====================
  'sqrt'      (n / N)^2                                first moments, momenta
  'sqrt_log'  ((n - 10) / (N - 10))^2 from n = 16 on,  first moments of Adam
              below it in ratios of 2; n = 0 is zero
  'log'       equal ratios from the smallest to the    second moments
              largest of the block; n = 0 is zero
  'dynamic'   decades, linear within each              8-bit optimizers
  'softsign'  z / (2 - z), z = n / N                   FlashOptim's momenta
  'linear'    n / N; 4 bits unsigned: (n + 1) / 16     4-bit optimizers' nu
  =========== ======================================== ====================

  FlashOptim keeps second moments in unsigned 'sqrt', 4-bit optimizers first
  moments in 4 bits of signed 'dynamic'.

  Args:
    bits: 8 or 4.
    signed: False for second moments and other arrays that are not negative.
    map: see above; 'sqrt' if signed, else 'log'.
    block_size: values of a block, along the last axis. An array whose last two
      axes are no multiples of (8, ``block_size``) has one scale per row.
    scale: 'block', or 'rank1': the smallest of the largest magnitudes of a
      value's row, column, ...; sum(shape) numbers, for two axes or more.
    rounding: 'nearest' or 'stochastic' (needs a key). 'log' takes the last
      word of a key for the number of a step, over which draws are even:
      ``jax.random.key`` will do for one array, ``compressed`` counts steps.
    stochastic_below: a code, from which on 'stochastic' takes the nearer one
      all the same. An average with decay b that nothing is added to falls by
      half a code and more from code 1 / (1 - b) on ('sqrt', 'softsign',
      'linear'; 10 + 1 / (1 - b) for 'sqrt_log'); below, it would stand still if
      it were rounded to nearest. Towards a gradient that has no noise at all
      the larger ones stop half as many codes away.
    keep_nonzero: whether unsigned values that are not zero never become zero,
      however small beside their block. The published formats let them: then
      Adam divides by nothing but eps. 'log' keeps them in any case, and 4 bits
      of 'linear' have no zero.

  Raises:
    ValueError: for arguments that do not go together; in ``encode``, where a
      key is missing.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from optax_mp import formats
    >>> x = jax.random.normal(jax.random.key(0), (256, 256))
    >>> for format in (formats.BlockInt(8), formats.BlockInt(4)):
    ...   error = format.decode(format.encode(x), x) - x
    ...   print(f'{formats.bits_per_value(format, x.shape)} {error.std():.3f}')
    8.25 0.007
    4.25 0.122

  **Caveats:** rounded to nearest, an average that moves by less than half a
  step of its code stands still: second moments with b2 = 0.999 want
  'stochastic'. Values below 2^-126 become zeros. In a block whose largest is
  above 2^126 all may, except with 'log': the inverse of its scale underflows.

  **Overflow:** infinities and NaNs are kept, and their block has a few codes
  fewer ('log' in 8 bits: 6 per octave are left). Signed, a magnitude above 2^48
  beside smaller ones becomes their largest and keeps its sign. Unsigned, values
  above 2^96 become 2^120 and never decay; negative ones become NaN.

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2022;
    Li et al., `Memory Efficient Optimizers with 4-bit States
    <https://arxiv.org/abs/2309.01507>`_, 2023;
    `FlashOptim <https://arxiv.org/abs/2602.23349>`_, 2026
  """

  bits: Literal[8, 4] = 8
  signed: bool = True
  map: (
    Literal['sqrt', 'sqrt_log', 'log', 'dynamic', 'softsign', 'linear'] | None
  ) = None
  block_size: int = 128
  scale: Literal['block', 'rank1'] = 'block'
  rounding: Literal['nearest', 'stochastic'] = 'nearest'
  stochastic_below: int | None = None
  keep_nonzero: bool = True

  def __post_init__(self):
    _base.check_choice(self.bits, 'bits', (8, 4))
    if self.map is None:
      object.__setattr__(self, 'map', 'sqrt' if self.signed else 'log')
    _base.check_choice(self.map, 'map', _MAPS)
    _base.check_choice(self.scale, 'scale', ('block', 'rank1'))
    _base.check_rounding(self)
    _groups.check_block_size(self.block_size)
    self._check_stochastic_below()
    if self.map == 'sqrt_log' and not (self.signed and self.bits == 8):
      raise ValueError(
        "`map='sqrt_log'` is for 8 bits with signs; got "
        f"bits={self.bits}, signed={self.signed}. Use map='softsign' for 4 "
        "bits, map='log' for unsigned values."
      )
    if self.map == 'log' and (self.signed or self.scale == 'rank1'):
      raise ValueError(
        "`map='log'` is for unsigned values with a grid a block; got "
        f'signed={self.signed}, scale={self.scale!r}. Use signed=False and '
        "scale='block', or another map."
      )

  @property
  def relative(self) -> bool:
    """Whether errors are in proportion to values."""
    return self.map == 'log'

  @property
  def without_signs(self) -> 'BlockInt':
    """The same for values that are not negative; 'sqrt' for 'sqrt_log'."""
    map = 'sqrt' if self.map == 'sqrt_log' else self.map
    return dataclasses.replace(self, signed=False, map=map)

  def fit(self, x: chex.Array) -> Any:
    """The scales that ``encode`` would store."""
    return _groups.fit(self._grid(), self._groups(x.shape), x)

  def encode(
    self, x: chex.Array, key: chex.PRNGKey | None = None, scales: Any = None
  ) -> Block:
    """Rounds ``x`` to codes; with scales of ``fit``, if there are any yet."""
    noise = None if self.rounding == 'nearest' else _base.check_key(key, self)
    x = jnp.asarray(x, jnp.float32)
    scales = self.fit(x) if scales is None else scales
    wide = _groups.expand(self._groups(x.shape), scales)
    grid = self._grid()
    has_zero = not isinstance(getattr(grid, 'map', None), _maps.LinearNoZero)
    keep = self.keep_nonzero and not self.signed and has_zero
    code = _grids.round_to(grid, x, wide, noise, keep, self.stochastic_below)
    return Block(self._stored(code, x), scales)

  def decode(self, stored: Block, like: jax.ShapeDtypeStruct) -> chex.Array:
    """Gives the codes' values, in the dtype of ``like``."""
    wide = _groups.expand(self._groups(like.shape), stored.scales)
    code = jnp.asarray(stored.codes, jnp.int32) - self._lowest() - self._zero()
    if not self.signed:
      return _grids.value_of(self._grid(), code, wide).astype(like.dtype)
    value = _grids.value_of(self._grid(), jnp.abs(code), wide)
    return jnp.where(code < 0, -value, value).astype(like.dtype)

  def note(self, shape: tuple[int, ...]) -> str:
    """A remark on arrays of this shape, which the plan shows."""
    if self.scale == 'rank1' and len(shape) > 1:
      return ''
    return _blocks.why_rows(shape, self.block_size)

  def _check_stochastic_below(self) -> None:
    below = self.stochastic_below
    _base.check_static(below, 'stochastic_below')
    if below is None:
      return
    known = self.map not in ('log', 'dynamic') and self.rounding != 'nearest'
    if not _base.is_integer(below) or below < 1 or not known:
      raise ValueError(
        '`stochastic_below` must be a positive integer or None, and is for '
        "rounding='stochastic' with map='sqrt', 'softsign' or 'linear'; got "
        f'{below!r} with rounding={self.rounding!r} and map={self.map!r}.'
      )

  def _grid(self) -> _grids.Grid:
    top = 2 ** (self.bits - self.signed) - 1
    if self.map == 'log':
      return _octaves.Octaves(top) if self.bits == 8 else _log.Log(top)
    if self.map == 'dynamic':
      tree = _dynamic.Dynamic(self.bits - 1, doubled=not self.signed)
      return _maps.Scaled(tree, self.signed)
    if self.map == 'linear' and not self.signed and self.bits == 4:
      return _maps.Scaled(_maps.LinearNoZero(top), self.signed)
    return _maps.Scaled(_maps.BY_NAME[str(self.map)](top), self.signed)

  def _groups(self, shape: tuple[int, ...]) -> Any:
    if self.scale == 'rank1' and len(shape) > 1:
      return _groups.Rank1(shape)
    return _blocks.cut(shape, self.block_size)

  def _zero(self) -> int:
    """The code of zero, among the table's codes counted from 0."""
    in_order = self.signed and self.map == 'dynamic'
    return 2 ** (self.bits - 1) - 1 if in_order else 0

  def _lowest(self) -> int:
    """The stored number of code 0. Orbax can save int4, so 4 bits are int4."""
    symmetric = self.signed and not self._zero()
    return -8 if self.bits == 4 and not symmetric else 0

  def _stored(self, code: jax.Array, x: jax.Array) -> jax.Array:
    """Magnitude -> code with the sign of x, as it is stored."""
    zero = self._zero()
    if zero:  # the tree has a code for 1 and none for -1
      code = jnp.where(x < 0, -jnp.minimum(code, zero), code) + zero
    elif self.signed:
      code = jnp.where(x < 0, -code, code)
    unsigned = self.bits == 8 and (not self.signed or zero)
    kind = f'{"u" if unsigned else ""}int{self.bits}'
    return (code + self._lowest()).astype(kind)
