# SPDX-License-Identifier: Apache-2.0
"""What recipes are made of: a signature, a rule, the two wrappers."""

from collections.abc import Callable, Mapping
import inspect
import math
import numbers
from typing import Any, Literal, ParamSpec, TypeVar

import optax

from optax_mp import formats
from optax_mp._core import _hyperparams
from optax_mp._core import _patterns
from optax_mp.formats import _maps
from optax_mp.formats import _rule
from optax_mp.wrappers import _compressed
from optax_mp.wrappers import compensated

_P = ParamSpec('_P')
_R = TypeVar('_R')

# Below it, an average that nothing is added to falls by more than half a code
# from most codes.
_FAST = 0.95


def like(base: Callable[..., Any], *decays: str, **defaults: Any):
  """Gives a recipe the signature of the Optax optimizer that it wraps.

  So that editors and ``optax.inject_hyperparams`` see every hyperparameter, as
  the installed Optax has them.

  Args:
    base: the Optax optimizer.
    *decays: names of its decays by which the recipe chooses a format.
    **defaults: defaults of ours in place of Optax's.

  Returns:
    A decorator for ``recipe(*args, <our keywords>, **kwargs)``.
  """

  def decorate(
    recipe: Callable[_P, _R],
  ) -> _hyperparams.Factory[_P, _R]:
    theirs = inspect.signature(base).parameters.values()
    ours = inspect.signature(recipe)
    parameters = [
      p.replace(default=defaults.get(p.name, p.default)) for p in theirs
    ]
    names = {p.name for p in parameters}
    parameters += [
      p
      for p in ours.parameters.values()
      if p.kind is p.KEYWORD_ONLY and p.name not in names
    ]
    recipe.__signature__ = ours.replace(parameters=parameters)  # type: ignore
    return _hyperparams.factory(decays=decays)(recipe)

  return decorate


def argument(
  base: Callable[..., Any], name: str, args: Any, kwargs: Mapping[str, Any]
) -> Any:
  """What ``base(*args, **kwargs)`` takes for the argument ``name``."""
  bound = inspect.signature(base).bind_partial(*args, **kwargs)
  bound.apply_defaults()
  return bound.arguments[name]


def sgd_with_momentum(
  args: Any, kwargs: Mapping[str, Any]
) -> tuple[optax.GradientTransformation, Any]:
  """``optax.sgd`` and its momentum, 0.9 unless given."""
  bound = inspect.signature(optax.sgd).bind(*args, **kwargs)
  bound.arguments.setdefault('momentum', 0.9)
  momentum = bound.arguments['momentum']
  if momentum is None:
    raise ValueError(
      '`momentum` must be a number; got None, which leaves no state to '
      'compress. Use `compensated(optax.sgd(...))`.'
    )
  return optax.sgd(*bound.args, **bound.kwargs), momentum


def first_moment(
  *decays: Any, bits: Literal[8, 4] = 8, **settings: Any
) -> formats.BlockInt:
  """The format of averages of gradients.

  Rounded stochastically where an average that nothing is added to would stand
  still. Elsewhere the nearer code is a smaller error as long as gradients have
  noise; without any, it stops 1 / (2 (1 - decay)) codes short of them.
  """
  below = None
  if is_fast(*decays):
    below = max(math.floor(1 / (1 - max(0.0, decay))) for decay in decays)
    if settings.get('map') == 'sqrt_log':
      below = max(below + _maps.SqrtLog.shift, _maps.SqrtLog.first)
  settings |= {'rounding': 'stochastic', 'stochastic_below': below}
  return formats.BlockInt(bits, **settings)


def divided_first_moment(decay: Any) -> formats.Format:
  """The same of one that is divided by the root of a second moment.

  Then small ones count as much as large ones. The noise of ratios of two adds
  up in slow averages, which keep the finer codes. The decay chooses for a new
  state alone: one that was made with another decay keeps its map.
  """
  fine, wide = (first_moment(decay, map=m) for m in ('sqrt', 'sqrt_log'))
  new, other = (wide, fine) if is_fast(decay) else (fine, wide)
  return _rule.Either(new, (other,))


def is_fast(*decays: Any) -> bool:
  """Whether averages are known to fall by more than half of most codes."""
  return all(isinstance(d, numbers.Real) and d < _FAST for d in decays)


def second_moment(bits: Literal[8, 4] = 8, **settings: Any) -> formats.BlockInt:
  """The format of an average of squares."""
  return formats.BlockInt(bits, signed=False, rounding='stochastic', **settings)


def assemble(
  inner: Any,
  rule: formats.Rule,
  residual_bits: int,
  min_size: int,
  seed: int,
  keep_float32: str | None = None,
):
  """The optimizer, its state kept by the rule, its parameters in 16 bits."""
  kept = _patterns.compiled(keep_float32)
  # A group of biases alone has nothing to compress, and that is no mistake.
  small = _compressed.keep_compressed(
    inner, rule, min_size, seed, may_do_nothing=True, kept=kept
  )
  return compensated(small, residual_bits, seed=seed)
