# SPDX-License-Identifier: Apache-2.0
"""What the laws and contracts run over: a new thing adds one row."""

from collections.abc import Callable
import dataclasses
import functools
import inspect
import math
from typing import Any

import ml_dtypes
import numpy as np
import optax

import optax_mp
from optax_mp import formats

BF16 = formats.BFloat16
SPLIT = formats.Split
INT = formats.BlockInt
TINY = 2.0**-126  # the smallest normal number
_NONE = np.False_  # of an array's values


@dataclasses.dataclass(frozen=True)
class FormatRow:
  """A format and what it promises.

  The error of a value has a bound of its own, `rel` to `absolute`, or, where
  values share a scale, one that depends on all of them, `bound`.
  """

  format: Any
  bits: float  # per value of a large array
  rel: float = 0.0  # |decode(encode(x)) - x| <= rel * |x|, for x from `low`
  low: float = 1e-30
  high: float = 1e38  # ... to `high`
  absolute: float = 0.0  # ... or <= absolute
  exact: bool = False  # decode(encode(x)) is x, bit for bit
  # ... of an array and of its values that were no numbers, which are 0 in it.
  bound: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
  shares: str = ''  # a scale, with its 'block', its 'cross' or the 'matrix'
  signed: bool = True  # False: for values that are not negative
  mirror: bool = True  # -x comes back as minus what x does
  symmetric: bool = True  # False: the largest of a block is, +1, has no -1
  zero: bool = True  # zeros come back as zeros, beside others as well
  nonzero: bool = True  # and others never as zeros
  fixed: int | None = 0  # ulps by which a second store moves; None: a bin
  log_codes: int = 0  # how many, where logarithms are rounded
  # Which values are rounded stochastically, if the format is; None: all.
  drawn: Callable[[np.ndarray], np.ndarray] | None = None
  axes: int = 0  # arrays of fewer are refused
  ulps: int = 0  # by which two programs may differ in what they decode
  slop: float = 0.0  # what float32 adds to `bound`, relative to values
  odd: bool = True  # tried on odd shapes and on eight devices as well


def _mask(bad: np.ndarray, x: np.ndarray) -> np.ndarray:
  return np.broadcast_to(bad, x.shape)


def grouped(x: np.ndarray, size: int = 128) -> np.ndarray:
  """Values that share a scale, a group a row, as the formats document it."""
  tiles = x.ndim < 2 or x.shape[-2] % 8 == 0
  if x.ndim and x.shape[-1] % size == 0 and tiles:
    return x.reshape(-1, size)
  count = 1
  for length in reversed(x.shape):
    count *= length
    if count >= 16:
      break
  return x.reshape(-1, max(count, 1))


def largest(x: np.ndarray) -> np.ndarray:
  """The largest of each value's group."""
  groups = grouped(x)
  wide = np.broadcast_to(groups.max(-1, keepdims=True), groups.shape)
  return wide.reshape(x.shape)


def units(x: np.ndarray, bad: np.ndarray, last: float) -> np.ndarray:
  """The scale of each value: the largest of its group.

  Beside a value that is no number it is larger, so that the largest has the
  code whose value is ``last``: those after it are for what is no number.
  """
  return largest(x) / np.where(largest(bad), last, 1.0)


def smaller_units(x: np.ndarray, bad: np.ndarray, last: float) -> np.ndarray:
  """The smaller one of the scales of its row and of its column."""
  if x.ndim < 2 or not x.size:
    return units(x, bad, last)
  rows, columns = (
    x.max(axis, keepdims=True)
    / np.where(bad.any(axis, keepdims=True), last, 1.0)
    for axis in (1, 0)
  )
  return np.minimum(rows, columns)


def tree(decades: int, cells: int) -> np.ndarray:
  """The dynamic tree of one sign: middles of 1, 2, 4, ... `cells` a decade."""
  values = [0.0]
  for i in range(decades):
    edges = np.linspace(0.1, 1.0, cells * 2**i + 1)
    values.extend(10.0 ** (i - decades + 1) * (edges[:-1] + edges[1:]) / 2)
  return np.array([*values, 1.0])


def small_codes(map: str, top: int, below: int):
  """Which values lie between codes up to the one that is given."""
  limit = codes(map, top)[below]
  return lambda x: np.abs(x) < limit * largest(np.abs(x))


def codes(map: str, top: int) -> np.ndarray:
  """The values of all codes of a map, from its definition."""
  n = np.arange(top + 1)
  z = n / top
  squares = ((n - 10) / (top - 10)) ** 2
  ratios = (6 / (top - 10)) ** 2 * 2.0 ** (n - 16) * (n > 0)
  return {
    'linear': z,
    'sqrt': z**2,
    'sqrt_log': np.where(n < 16, ratios, squares),
    'softsign': z / (2 - z),
  }[map]


def numbers(dtype: Any) -> np.ndarray:
  """All finite numbers of an fp8 dtype that are not negative."""
  values = np.arange(128, dtype=np.uint8).view(dtype).astype(np.float64)
  return values[np.isfinite(values)]


E4M3 = numbers(ml_dtypes.float8_e4m3fn)
E5M2 = numbers(ml_dtypes.float8_e5m2)
NO_ZERO = np.arange(17) / 16  # but for its first: there is no code for 0


def sharing(row: FormatRow, mask: np.ndarray) -> np.ndarray:
  """Values that share a scale with one of those of a mask, and those."""
  if row.shares == 'block':
    return largest(mask)
  if row.shares == 'cross' and mask.ndim > 1:
    return mask.any(0, keepdims=True) | mask.any(1, keepdims=True)
  if row.shares == 'matrix':
    return np.broadcast_to(mask.any((-2, -1), keepdims=True), mask.shape)
  return largest(mask) if row.shares else mask


def lost(row: FormatRow, mask: np.ndarray) -> np.ndarray:
  """Values that come back as one of those of a mask, and those.

  A matrix of factors has marks of rows and columns only.
  """
  if row.shares == 'matrix':
    return mask.any(-1, keepdims=True) & mask.any(-2, keepdims=True)
  return mask


def outliers(row: FormatRow, x: np.ndarray) -> np.ndarray:
  """Values that only an overflow makes, beside others that share their scale.

  Above 2^48, or 2^96 where there are no signs: squares.
  """
  size = np.abs(x)
  huge = size > (2.0**48 if row.signed else 2.0**96)
  return huge & sharing(row, (size >= TINY) & ~huge) & bool(row.shares)


# Derived bounds: half the bin that a value is in, all of it if rounded
# stochastically. `whole` are bins that only one of their ends rounds to: the
# first where nothing becomes zero, the last where there is no -1.


def scaled(values, share=0.5, whole=(), scale=units, last=-3):
  """Bins of a map, in units of the scale; ``last`` as for :func:`units`."""
  moves = share * np.diff(values)
  for i in whole:
    moves[i] = np.diff(values)[i]

  def bound(x, bad=_NONE):
    x = np.abs(x.astype(np.float64))
    unit = scale(x, _mask(bad, x), values[last])
    fraction = x / np.where(unit > 0, unit, 1.0)
    code = np.searchsorted(values, fraction, 'right') - 1
    return moves[np.clip(code, 0, len(moves) - 1)] * unit

  return bound


def logarithmic(top, share=0.5):
  """Bins of equal steps of the logarithm, between the ends of a group."""

  def bound(x, bad=_NONE):
    x = np.abs(x)
    low, high, step = log_range(x, top, largest(_mask(bad, x)))
    if top == 255:  # a position has 24 bits, a step 20
      move = share * step + 2**-19 * (high - low) + 4
    else:
      move = share * step + 64 + 16  # as little need not be rounded outwards
    log = log_word(x)
    # What is below the first code becomes it.
    low, high = value(log - move), value(np.maximum(log, low) + move)
    x = x.astype(np.float64)
    return np.maximum(x - low, high - x) * (x > 0)

  return bound


def log_range(x, top, marked=False):
  """Ends of each value's group, as logarithms, and the steps between.

  Of 255 codes they are from the octave of the least to the largest, a whole
  number of 4 significant bits an octave; of 15 the ends are rounded
  outwards, each by up to 2^13. They reach down 40 octaves, or 15.

  Groups that are marked, beside values that are no numbers, reach down from
  their largest value to the smallest number, or as far; of 15 codes 16 octaves.
  Three codes fewer are left.
  """
  low = -largest(-np.where(x >= TINY, x, np.float32(np.inf)))
  low = np.where(marked, TINY, np.minimum(low, largest(x)))
  low, high = log_word(low), log_word(largest(x))
  low = np.maximum(low, high - (40 if top == 255 else 15) * 2.0**23)
  if top < 255:
    step = (high - low + 2 * 2**13) / (top - 1)
    return low, high, np.where(marked, 16 * 2.0**23 / (top - 1), step)
  octave = np.floor(low / 2.0**23) * 2.0**23
  fraction, exponent = np.frexp(largest(x).astype(np.float64))
  exponent = np.where(fraction > 0, exponent + 126, 1)
  word = 2.0**23 * (exponent + np.maximum(2 * fraction - 1, 0))
  high = word + 2.0**23 / 12  # or less: where sqrt(3 m - 2) - m is largest
  codes = np.where(marked, 251, 254)
  steps = np.clip(codes * 2.0**23 / (high - octave), 1, 512)
  fraction, exponent = np.frexp(steps)
  steps = np.floor(np.ldexp(np.floor(16 * fraction) / 16, exponent))
  return octave, high, 2.0**23 / steps


def log_word(x):
  """2^23 (log2 x + 127), nearly: of the mantissa m it takes sqrt(3 m - 2)."""
  mantissa, exponent = np.frexp(np.maximum(np.asarray(x, np.float64), TINY))
  root = np.sqrt(3 * (2 * mantissa) - 2)
  return 2.0**23 * (exponent - 1 + 127 + root - 1)


def value(log):
  """The inverse of ``log_word``, in the range of float32."""
  log = np.clip(log, 0x00800000, 0x7F7FFFFF) / 2.0**23
  octave = np.floor(log)
  root = log - octave + 1
  return 2.0 ** (octave - 127) * (root**2 + 2) / 3


def expanded(numbers, share=0.5, last=-3):
  """Bins of fp8 numbers to the power 1/k, with COAT's k for each group."""
  fractions = numbers / numbers[-1]
  reach = np.log2(numbers[-1] ** 2 / 2)

  def bound(x, bad=_NONE):
    groups = grouped(np.abs(x.astype(np.float64)))
    marked = grouped(_mask(bad, x)).any(-1, keepdims=True)
    high = groups.max(-1, keepdims=True)
    high = np.where(high >= TINY, high, TINY)
    low = np.where(groups >= TINY, groups, np.inf).min(-1, keepdims=True)
    octaves = np.log2(high) - np.log2(np.minimum(low, high))
    k = np.floor(16 * reach / np.maximum(octaves, 2**-10)).clip(8, 255) / 16
    # Beside what is no number the widest range, up to the code ``last``.
    k = np.where(marked, 0.5, k)
    high = np.where(marked, high / power(fractions[last], 2), high)
    grid = power(fractions, 1 / k) * rounded_up(high)
    code = (grid[:, None, :] <= groups[..., None]).sum(-1) - 1
    code = np.clip(code, 0, len(fractions) - 2)
    move = np.where(code == 0, 1.0, share) * np.take_along_axis(
      np.diff(grid), code, -1
    )
    return move.reshape(x.shape)

  return bound


def power(x: np.ndarray, exponent: Any) -> np.ndarray:
  """A power, with a logarithm that is linear between powers of two."""
  mantissa, binade = np.frexp(np.where(x > 0, x, 1.0))
  log = (binade + 2 * mantissa - 2) * exponent
  whole = np.floor(log)
  return np.where(x > 0, np.ldexp(1 + log - whole, whole.astype(int)), 0.0)


def rounded_up(x: np.ndarray) -> np.ndarray:
  """To bfloat16, but not to infinity."""
  words = x.astype(np.float32).view(np.uint32).astype(np.uint64)
  words = np.minimum((words + 0xFFFF) >> 16, 0x7F7F).astype(np.uint32) << 16
  return words.view(np.float32).astype(np.float64)


def feedback(value, residual, relative=False):
  """Half the widest bin of the residuals' map, times the largest residual."""
  widest = np.diff(residual).max() / 2

  def bound(x, bad=_NONE):
    error, x = value(x, bad), np.abs(x.astype(np.float64))
    if not relative:
      return widest * largest(error)
    # A residual is relative to what was stored, within `error` of x; to more
    # than x, and at most 1, where x is below the first code.
    ratio = np.divide(error, x - error, np.ones(x.shape), where=error < x)
    ratio = np.where(error > 0, np.minimum(ratio, 1.0), 0.0)
    return widest * largest(ratio) * (x + error)

  return bound


def _filled(x, bad, axis):
  """Means where rank 1 continues into the crossings of marked rows and columns.

  From Q' P' = m T', the product of the marked sums with the crossing m, where
  Q' = Q + m, P' = P + m, T' = T + m.
  """
  own, across = (bad.any(a, keepdims=True) for a in (axis, -3 - axis))
  total, q, p = (np.sum(x * mask, (-2, -1)) for mask in (1, own, across))
  neither = total - q - p
  crossing = q * p / np.where(neither > 0, neither, 1)
  grown = np.where(q > 0, 1 + crossing / np.where(q > 0, q, 1), 1)
  return x.mean(axis, keepdims=True) * np.where(own, grown, 1)


def factored(x, bad=_NONE):
  """Exact: how far the array is from rows times columns over the mean."""
  x = x.astype(np.float64)
  if not x.size:
    return x
  bad = _mask(bad, x)
  row, column = _filled(x, bad, -1), _filled(x, bad, -2)
  mean = row.mean(-2, keepdims=True)
  product = row / np.where(mean > 0, mean, 1.0) * column
  # A row's share of all may underflow.
  return np.abs(product - x) + 2**-18 * product + 2.0**-126 * column


def affine(codes):
  """Half a step between the ends of a group, in bfloat16, rounded outwards."""

  def bound(x, bad=_NONE):
    groups, top = grouped(x.astype(np.float64)), codes - 1
    top = top - 3 * grouped(_mask(bad, x)).any(-1, keepdims=True)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    size = np.maximum(np.abs(low), np.abs(high))
    # A step has 20 bits, what it is added to 24.
    range_ = (high - low) + 2**-7 * (np.abs(low) + np.abs(high))
    move = range_ * (0.5 / top + 2**-20) + 2**-23 * size
    return np.broadcast_to(move, groups.shape).reshape(x.shape)

  return bound


# A division by a constant may be compiled to a multiplication.
DIVIDED: dict[str, Any] = {'ulps': 4, 'fixed': 4}
# A product and a sum may be compiled to one operation, which rounds once.
MULTIPLIED: dict[str, Any] = {'ulps': 2}
# Grids that depend on the smallest value of a block, too. They need no
# reciprocal of the largest, which is not a normal number above 2^126.
ENDS: dict[str, Any] = {'fixed': None, 'high': 1e38}
# fp8 numbers to a power: logarithms of 33 octaves have 2^-18 of one.
POWERS: dict[str, Any] = {'nonzero': True, 'slop': 2**-16, **ENDS}
# The largest of a signed tree is +1: blocks shrink if theirs is negative.
NO_MINUS_1: dict[str, Any] = {'symmetric': False, 'fixed': None}


def block(format, bits, bound, **promises):
  """The row of a format with a scale a block."""
  own: dict[str, Any] = {'shares': 'block', 'nonzero': False, 'slop': 2**-20}
  # Arrays are cut into blocks by the same lines for all of these formats.
  own |= {'high': 2.0**126, 'odd': False}
  return FormatRow(format, bits, bound=bound, **(own | promises))


def block_int(
  map: Any, bits: Any, signed=True, rounding: Any = 'nearest', **promises
):
  """The row of a `BlockInt` that is named by what it does."""
  share = 0.5 if rounding == 'nearest' else 1.0
  if map == 'log':
    top = 2**bits - 1
    bound, own = logarithmic(top, share), ENDS | {'log_codes': top}
    own = own | MULTIPLIED
  else:
    values, whole, own = codebook(map, bits, signed)
    one_sided = map == 'dynamic' and signed
    bound = scaled(values, share, whole, last=-3 - (one_sided or not signed))
  if not signed:
    own = own | {'signed': False, 'nonzero': True}
  format = INT(bits, signed, map, rounding=rounding)
  return block(format, bits + 0.25, bound, **(own | promises))


def codebook(map, bits, signed):
  """Magnitudes of codes, bins that are moved through, and promises."""
  top = 2 ** (bits - signed) - 1
  if map == 'dynamic' and signed:
    return tree(bits - 1, 1), [-1], {'ulps': 8} | NO_MINUS_1
  if map == 'dynamic':
    return tree(bits - 1, 2), [0], {'ulps': 8}
  if map == 'linear' and top == 15:
    return NO_ZERO, [0], {'zero': False}
  divided = {} if map == 'softsign' else DIVIDED
  return codes(map, top), [] if signed else [0], divided


FORMATS = {
  'bfloat16': FormatRow(BF16(), 16, 2**-8),
  'bfloat16-stochastic': FormatRow(BF16('stochastic'), 16, 2**-7),
  'float16': FormatRow(formats.Float16(), 16, 2**-11, 6.2e-5, 6.5e4, 2**-25),
  'float16-stochastic': FormatRow(
    formats.Float16('stochastic'), 16, 2**-10, 6.2e-5, 6.5e4, 2**-24
  ),
  'split-16': FormatRow(SPLIT(16), 32, 0.0, 0.0, 3.4e38, exact=True),
  'split-8': FormatRow(SPLIT(8), 24, 2**-16),
  'split-8-stochastic': FormatRow(SPLIT(8, 'stochastic'), 24, 2**-15),
  'split-float16-16': FormatRow(
    formats.SplitFloat16(16), 32, 0.0, 6.2e-5, 6.5e4, 2**-40
  ),
  'split-float16-8': FormatRow(
    formats.SplitFloat16(8), 24, 2**-18, 6.2e-5, 6.5e4, 2**-32
  ),
  'split-float16-8-stochastic': FormatRow(
    formats.SplitFloat16(8, 'stochastic'), 24, 2**-17, 6.2e-5, 6.5e4, 2**-31
  ),
  'feedback': FormatRow(formats.ErrorFeedback(BF16(), BF16()), 32, 2**-16),
  'feedback-split': FormatRow(
    formats.ErrorFeedback(BF16('stochastic'), SPLIT(8)), 40, 2**-21
  ),
  'sqrt-8-stochastic': block_int('sqrt', 8, rounding='stochastic', odd=True),
  'sqrt-8-below': block(
    INT(8, rounding='stochastic', stochastic_below=40),
    8.25,
    scaled(codes('sqrt', 127), 1.0),
    drawn=small_codes('sqrt', 127, 40),
    **DIVIDED,
  ),
  'sqrt-log-8-below': block(
    INT(8, map='sqrt_log', rounding='stochastic', stochastic_below=40),
    8.25,
    scaled(codes('sqrt_log', 127), 1.0),
    drawn=small_codes('sqrt_log', 127, 40),
    **DIVIDED,
  ),
  'sqrt-8-unsigned-stochastic': block_int('sqrt', 8, False, 'stochastic'),
  'log-8-stochastic': block_int('log', 8, False, 'stochastic'),
  'log-4-stochastic': block_int('log', 4, False, 'stochastic'),
  'dynamic-8': block_int('dynamic', 8),
  'dynamic-8-unsigned': block_int('dynamic', 8, False),
  'dynamic-4': block_int('dynamic', 4, odd=True),
  'softsign-8': block_int('softsign', 8),
  'softsign-4-stochastic': block_int('softsign', 4, rounding='stochastic'),
  'linear-4-unsigned': block_int('linear', 4, False),
  'linear-4-rank1': block(
    INT(4, False, 'linear', scale='rank1'),
    4 + 32 * (256 + 1024) / (256 * 1024),
    scaled(NO_ZERO, whole=[0], scale=smaller_units, last=-4),
    shares='cross',
    signed=False,
    zero=False,
    nonzero=True,
    odd=True,
  ),
  'affine-4': block(
    formats.Affine(block_size=128),
    4.25,
    affine(16),
    zero=False,
    mirror=False,
    fixed=None,
    odd=True,
  ),
  'e4m3': block(formats.Float8(), 8.25, expanded(E4M3), odd=True, **POWERS),
  'e5m2': block(formats.Float8('e5m2'), 8.25, expanded(E5M2), **POWERS),
  'e4m3-stochastic': block(
    formats.Float8(rounding='stochastic'), 8.25, expanded(E4M3, 1.0), **POWERS
  ),
  'e4m3-unsigned': block(
    formats.Float8(signed=False),
    8.25,
    expanded(E4M3, last=-4),
    signed=False,
    **POWERS,
  ),
  'factored': block(
    formats.Factored(),
    32 * (256 + 1024) / (256 * 1024),
    factored,
    shares='matrix',
    high=1e36,  # sums of rows and columns are finite
    signed=False,
    zero=False,
    nonzero=True,
    fixed=None,
    axes=2,
    ulps=3 * 33,  # three sums of up to 33 values, in any order
    odd=True,
  ),
  'feedback-8-4-unsigned': block(
    formats.ErrorFeedback(INT(8, False), INT(4)),
    12.5,
    feedback(logarithmic(255), codes('sqrt', 7), relative=True),
    signed=False,
    nonzero=True,
    odd=True,
    **ENDS,
    **MULTIPLIED,
  ),
}

# Optimizers: a learning rate at which Optax in float32 converges on the targets
# of test_contracts.py, and weight decay wherever there is any.
OPTIMIZERS = {
  'adabelief': lambda lr=1e-1: optax.adabelief(lr),
  'adadelta': lambda lr=1.0: optax.adadelta(lr, weight_decay=1e-6),
  'adafactor': lambda lr=3e-3: optax.adafactor(
    lr, min_dim_size_to_factor=2, weight_decay_rate=1e-6
  ),
  'adagrad': lambda lr=1.0: optax.adagrad(lr),
  'adam': lambda lr=1e-1: optax.adam(lr),
  'adamax': lambda lr=1e-1: optax.adamax(lr),
  'adamaxw': lambda lr=1e-1: optax.adamaxw(lr, weight_decay=1e-4),
  'adamw': lambda lr=1e-1: optax.adamw(lr, weight_decay=1e-4),
  'adan': lambda lr=1e-1: optax.adan(lr, weight_decay=1e-4),
  'amsgrad': lambda lr=1e-1: optax.amsgrad(lr),
  'lamb': lambda lr=1e-3: optax.lamb(lr, weight_decay=1e-4),
  'lion': lambda lr=1e-3: optax.lion(lr, b1=0.99, weight_decay=1e-4),
  'nadamw': lambda lr=1e-2: optax.nadamw(lr, weight_decay=1e-4),
  'novograd': lambda lr=1e-2: optax.novograd(lr, weight_decay=1e-4),
  'radam': lambda lr=5e-3: optax.radam(lr),
  'rmsprop': lambda lr=5e-3: optax.rmsprop(lr, momentum=0.9),
  'sgd-momentum': lambda lr=1e-3: optax.sgd(lr, momentum=0.9),
  'sm3': lambda lr=1.0: optax.sm3(lr),
  'yogi': lambda lr=1e-1: optax.yogi(lr),
  'ademamix': lambda lr=1e-3: optax.contrib.ademamix(lr, weight_decay=1e-4),
  'muon': lambda lr=1e-2: optax.contrib.muon(
    lr, weight_decay=1e-4, adam_weight_decay=1e-4
  ),
}

# Wrappers: how they go around an optimizer, and the dtype of the parameters.
WRAPPERS = {
  'compressed': lambda inner: optax_mp.compressed(
    inner, formats.Split(8), min_size=0
  ),
  'compensated-16': lambda inner: optax_mp.compensated(inner, 16),
  'compensated-8': lambda inner: optax_mp.compensated(inner, 8),
  'compensated-0': lambda inner: optax_mp.compensated(inner, 0),
  'both': lambda inner: optax_mp.compensated(
    optax_mp.compressed(inner, formats.Split(8), min_size=0)
  ),
}


@dataclasses.dataclass(frozen=True)
class StateRow:
  """A rule for the whole state of any optimizer."""

  rule: Any
  bits: Callable[[tuple[int, ...]], int]  # of an array of a shape


def _in_blocks(bits, block_size=128, scales=1):
  """Bits of whole blocks, or of fewer values that are one."""

  def count(shape):
    size = math.prod(shape)
    return bits * size + 32 * scales * max(1, size // block_size)

  return count


def _by_rank1(shape):
  whole = 8 * math.prod(shape) + 32 * sum(shape)
  return whole if len(shape) > 1 else _in_blocks(8)(shape)


def _in_factors(shape):
  few_axes = len(shape) < 2
  return _in_blocks(8)(shape) if few_axes else 32 * _rows_and_columns(*shape)


def _rows_and_columns(*shape):
  *stack, rows, columns = shape
  return math.prod(stack) * (rows + columns)


def _factored(path, leaf):
  del path
  return INT(8, signed=False) if len(leaf.shape) < 2 else formats.Factored()


# Momenta have signs; the last two are for squares.
STATES = {
  'int8': StateRow(INT(8, rounding='stochastic'), _in_blocks(8)),
  'int4': StateRow(
    INT(4, map='softsign', rounding='stochastic'), _in_blocks(4)
  ),
  'dynamic': StateRow(
    INT(8, map='dynamic', block_size=256), _in_blocks(8, 256)
  ),
  'rank1': StateRow(INT(8, scale='rank1', rounding='stochastic'), _by_rank1),
  'fp8': StateRow(formats.Float8(rounding='stochastic'), _in_blocks(8)),
  'e5m2': StateRow(
    formats.Float8('e5m2', block_size=32, expand=False), _in_blocks(8, 32)
  ),
  'int8-int4': StateRow(
    formats.ErrorFeedback(INT(8), INT(4)), _in_blocks(12, scales=2)
  ),
  'log': StateRow(INT(8, signed=False, rounding='stochastic'), _in_blocks(8)),
  'factored': StateRow(_factored, _in_factors),
}


@dataclasses.dataclass(frozen=True)
class RecipeRow:
  """A recipe, with settings that converge on the contracts' targets."""

  recipe: Callable[..., Any]
  bytes: float  # per parameter of a large matrix, with its gradient
  lr: float = 1e-2
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)


_SCALE = 4 / 128  # bytes per value
RECIPES = {
  'adamw_bf16': RecipeRow(optax_mp.adamw_bf16, 12.0),
  'sgdm_bf16': RecipeRow(optax_mp.sgdm_bf16, 9.0, 1e-3),
  'lion_bf16': RecipeRow(optax_mp.lion_bf16, 9.0, 1e-3, {'b1': 0.99}),
  'adamw_8bit': RecipeRow(optax_mp.adamw_8bit, 7 + 2 * _SCALE),
  'adamw_4bit': RecipeRow(optax_mp.adamw_4bit, 6 + 2 * _SCALE),
  'adamw_4bit_factored': RecipeRow(
    optax_mp.adamw_4bit_factored, 5.5 + _SCALE + 8 / 1024
  ),
  'coat_adamw': RecipeRow(optax_mp.coat_adamw, 7 + 2 * _SCALE),
  'flash_adamw': RecipeRow(optax_mp.flash_adamw, 7 + 8 * _SCALE),
  'lion_8bit': RecipeRow(optax_mp.lion_8bit, 6 + _SCALE, 1e-3, {'b1': 0.99}),
  'sgdm_8bit': RecipeRow(optax_mp.sgdm_8bit, 6 + _SCALE, 1e-3),
  'muon_8bit': RecipeRow(optax_mp.muon_8bit, 6 + _SCALE),
  'ademamix_8bit': RecipeRow(optax_mp.ademamix_8bit, 8 + 3 * _SCALE, 1e-3),
}


@dataclasses.dataclass(frozen=True)
class PaperRow:
  """An optimizer of a paper, with settings for small matrices."""

  make: functools.partial[Any]  # of a learning rate
  lr: float  # at which it converges on the contracts' targets
  # Bits of the state for a leaf of two axes or more, beside scalars and keys.
  bits: Callable[[tuple[int, ...]], float]
  vector: float = 64  # bits for a value of a vector
  decays: str = 'before'  # the step or 'after' it
  rest: str = 'adam'  # what other leaves get; '': there are none
  # The transformations of another row with other arguments: what wrappers make
  # of their state has been seen there.
  variant: bool = False

  @property
  def static(self) -> tuple[str, ...]:
    """Its arguments that decide what the program is, in their order."""
    return tuple(
      name for name in inspect.signature(self.make).parameters if name in STATIC
    )


# The learning rate and what else is a number may be traced.
STATIC = (
  'alpha',
  'axis',
  'block_size',
  'blocks',
  'density',
  'gap',
  'mask',
  'matrices',
  'min_dim_size_to_factor',
  'projector',
  'rank',
  'rewarm_steps',
  'seed',
  'square_axis',
  'subset_size',
  'window',
)


def _full(shape):
  return 32 * math.prod(shape)


def _sides(shape, shorter=0, longer=0, full=0, each=0):
  """32 bits for each of these: of sides of a matrix, all of it, a matrix."""
  *stack, rows, columns = shape
  sides = shorter * min(rows, columns) + longer * max(rows, columns)
  return 32 * (math.prod(stack) * (sides + each) + full * math.prod(shape))


def _paper(make, lr, vector=64, settings=None, form=None, **sides):
  bits = functools.partial(_sides, **sides)
  make = functools.partial(make, **(settings or {}))
  return PaperRow(make, lr, bits, vector, **(form or {}))


_DECAY = {'weight_decay': 1e-4}
_AFTER: dict[str, Any] = {'decays': 'after'}
_VARIANT: dict[str, Any] = {'variant': True}
_RANK = {'rank': 2, 'gap': 3, **_DECAY}  # new directions within a few steps


def _micro_adam(shape):
  """Of ten steps 1 % of each block, codes of 4 bits, two ends of 64 values."""
  *stack, rows, columns = shape
  block = min(rows * columns, 16384)
  kept = 10 * math.ceil(block / 100) * (16 + 32) + 4 * block + 32 * block / 64
  return math.prod(stack) * rows * columns / block * kept


PAPERS = {
  'came': _paper(
    optax_mp.came, 1e-3, settings=_DECAY, shorter=2, longer=2, full=1
  ),
  'lomo': _paper(optax_mp.lomo, 1e-2, 0, _DECAY),
  'adalomo': _paper(optax_mp.adalomo, 1e-3, 32, _DECAY, shorter=1, longer=1),
  'hfac': _paper(optax_mp.hfac, 1e-3, settings=_DECAY, shorter=2, longer=2),
  'adamw_sn': _paper(
    optax_mp.adamw_sn, 1e-2, settings=_DECAY, longer=1, full=1, form=_AFTER
  ),
  'adamw_snsm': _paper(
    optax_mp.adamw_snsm, 1e-2, settings=_RANK, shorter=2, longer=3, form=_AFTER
  ),
  'adamw_snsm-random': _paper(
    optax_mp.adamw_snsm,
    1e-2,
    settings=_RANK | {'projector': 'random'},
    longer=3,
    form=_AFTER | _VARIANT,
  ),
  'adamw_snsm-topk': _paper(
    optax_mp.adamw_snsm,
    1e-2,
    settings=_RANK | {'projector': 'topk'},
    shorter=2,
    longer=1,
    each=2,  # indices
    form=_AFTER | _VARIANT,
  ),
  'galore': _paper(
    optax_mp.galore, 1e-2, settings=_RANK, shorter=2, longer=4, form=_AFTER
  ),
  # The norm of the last step, for each matrix.
  'fira': _paper(
    optax_mp.fira,
    1e-2,
    settings=_RANK,
    shorter=2,
    longer=4,
    each=1,
    form=_AFTER,
  ),
  'apollo': _paper(
    optax_mp.apollo, 1e-2, settings=_RANK, longer=4, each=1, form=_AFTER
  ),
  'apollo_mini': _paper(
    optax_mp.apollo_mini,
    1e-2,
    settings={'gap': 3, **_DECAY},
    longer=2,
    each=1,
    form=_AFTER | _VARIANT,
  ),
  # Indices, and what rows are multiplied by.
  'grass': _paper(optax_mp.grass, 1e-2, settings=_RANK, shorter=4, each=4),
  'grass-drawn': _paper(
    optax_mp.grass,
    1e-2,
    settings=_RANK | {'rule': 'multinomial_norm', 'replacement': True},
    shorter=4,
    each=4,
    form=_VARIANT,
  ),
  'micro_adam': PaperRow(
    functools.partial(optax_mp.micro_adam, values_dtype='float32', **_DECAY),
    1e-3,
    _micro_adam,
    4 + 0.5 + 10 * 4 * (16 + 32) / 384,
  ),
  'adam_mini': PaperRow(
    functools.partial(
      optax_mp.adam_mini,
      blocks=optax_mp.optimizers.adam_mini_blocks(1),
      **_DECAY,
    ),
    1e-2,
    lambda shape: _sides(shape, full=1, each=shape[-1]),  # one a column
    32 + 32 / 384,
    rest='',
  ),
  'rmsprop_sn': _paper(
    optax_mp.rmsprop_sn,
    1e-3,
    32,
    _DECAY,
    longer=1,
    form=_AFTER | _VARIANT | {'rest': 'rmsprop'},
  ),
  'adagrad_sn': _paper(
    optax_mp.adagrad_sn,
    0.5,
    settings=_DECAY,
    longer=1,
    full=1,
    form=_AFTER | _VARIANT | {'rest': 'adagrad'},
  ),
  'adagrad_snsm': _paper(
    optax_mp.adagrad_snsm,
    0.5,
    settings=_RANK,
    shorter=2,
    longer=3,
    form=_AFTER | _VARIANT | {'rest': 'adagrad'},
  ),
  'adamw_sm': _paper(
    optax_mp.adamw_sm,
    1e-2,
    settings=_RANK,
    shorter=2,
    longer=2,
    full=1,
    form=_AFTER | _VARIANT,
  ),
  'sgd_sm': _paper(
    optax_mp.sgd_sm,
    1e-2,
    32,
    _RANK,
    shorter=2,
    longer=2,
    form=_AFTER | _VARIANT | {'rest': 'sgd'},
  ),
}
