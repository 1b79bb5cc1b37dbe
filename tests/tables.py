# SPDX-License-Identifier: Apache-2.0
"""What the laws and contracts run over: a new thing adds one row."""

import dataclasses
from typing import Any

import optax

import optax_mp
from optax_mp import formats

BF16 = formats.BFloat16
SPLIT = formats.Split


@dataclasses.dataclass(frozen=True)
class FormatRow:
  """A format and what it promises."""

  format: Any
  bits: float  # per value of a large array
  rel: float  # |decode(encode(x)) - x| <= rel * |x|, for x from `low` to `high`
  low: float = 1e-30
  high: float = 1e38
  absolute: float = 0.0  # ... or <= absolute
  exact: bool = False  # decode(encode(x)) is x, bit for bit


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
