# SPDX-License-Identifier: Apache-2.0
"""What is done to the gradient of one layer before and in its update."""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_mp._core import _finite
from optax_mp.backward import _checks


class Wanted(NamedTuple):
  """Which sums are."""

  norm: bool
  finite: bool
  state: bool  # whether what the update makes of them is finite, too


class Sums(NamedTuple):
  """What is added up over all gradients, float32 scalars."""

  squares: chex.Array
  not_finite: chex.Array  # how many are not

  @classmethod
  def zeros(cls) -> 'Sums':
    """Of no gradient yet."""
    return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


class Control(NamedTuple):
  """What the update of every layer needs to know, float32 scalars."""

  scale: chex.Array  # of the loss, and so of the gradients
  norm: chex.Array  # of the gradients, without the scale
  finite: chex.Array  # 1, or 0 where nothing may change

  @classmethod
  def zeros(cls) -> 'Control':
    """Of a pass that updates nothing."""
    return cls(*(jnp.zeros((), jnp.float32) for _ in cls._fields))


@dataclasses.dataclass(frozen=True)
class Update:
  """The update of one layer, or of the rest, with its options."""

  tx: optax.GradientTransformationExtraArgs
  max_norm: float | None
  guarded: bool
  scaled: bool

  def __call__(
    self, params: Any, state: Any, gradients: Any, control: Control, **extra
  ) -> tuple[Any, Any]:
    """The new parameters and the new state.

    Args:
      params: of one layer.
      state: of one layer.
      gradients: as the backward pass has them, of the scaled loss.
      control: the numbers that are the same for all layers.
      **extra: for ``tx``.

    Returns:
      Both, of the same shapes and dtypes.
    """
    gradients = self._prepared(gradients, control)
    updates, new_state = self.tx.update(gradients, state, params, **extra)
    _checks.same_state(new_state, state)
    new_params = optax.apply_updates(params, updates)
    if not self.guarded:
      return new_params, new_state
    # Not `lax.cond`, which would copy both.
    return jax.tree.map(
      lambda new, old: jnp.where(control.finite > 0, new, old),
      (new_params, new_state),
      (params, state),
    )

  def is_finite(
    self, params: Any, state: Any, gradients: Any, control: Control, **extra
  ) -> chex.Array:
    """Whether the update leaves all finite that was; the same arguments."""
    gradients = self._prepared(gradients, control)
    update = functools.partial(self.tx.update, **extra)
    return _finite.step_is_finite(update, gradients, state, params)

  def _prepared(self, gradients: Any, control: Control) -> Any:
    return jax.tree.map(
      lambda g: self._clipped(self._unscaled(g, control), control), gradients
    )

  def _unscaled(self, gradient: chex.Array, control: Control) -> chex.Array:
    """In float32: what a scale keeps from underflow must not underflow."""
    if not self.scaled:
      return gradient
    return gradient.astype(jnp.float32) / control.scale

  def _clipped(self, gradient: chex.Array, control: Control) -> chex.Array:
    """Operation by operation what ``optax.clip_by_global_norm`` does."""
    if self.max_norm is None:
      return gradient
    small = control.norm < self.max_norm
    wide = gradient.astype(jnp.float32)
    wide = (wide / control.norm) * jnp.float32(self.max_norm)
    return jnp.where(small, gradient, wide.astype(gradient.dtype))


def summed(gradients: Any, start: Sums, which: Wanted) -> Sums:
  """The sums with those of some gradients added."""
  squares, not_finite = start
  for gradient in jax.tree.leaves(gradients):
    wide = gradient.astype(jnp.float32)
    if which.norm:
      squares += jnp.sum(jnp.square(wide))
    if which.finite:
      not_finite += jnp.sum(~jnp.isfinite(wide), dtype=jnp.float32)
  return Sums(squares, not_finite)
