# SPDX-License-Identifier: Apache-2.0
"""A whole optimizer, whose other leaves get its plain form."""

from typing import Any

import optax

from optax_mp.optimizers._core import _adam
from optax_mp.optimizers._core import _groups


def with_plain(
  method: optax.GradientTransformation,
  plain: optax.GradientTransformation,
  learning_rates: tuple[Any, Any],
  decay: tuple[Any, _adam.Mask],
  matrices: _groups.Matrices,
) -> optax.GradientTransformationExtraArgs:
  """The method for some leaves and its plain form for the rest.

  Args:
    method: for ``matrices``.
    plain: without subsets or subspaces.
    learning_rates: of both; None is that of the first.
    decay: of weights after the step, and the mask.
    matrices: see :func:`adamw_sn`.

  Returns:
    A transformation.
  """
  learning_rate, other_learning_rate = learning_rates
  return _groups.alias(
    method,
    _adam.decay_after_step(learning_rate, *decay),
    matrices,
    plain,
    _adam.decay_after_step(
      _groups.own(other_learning_rate, learning_rate), *decay
    ),
  )
