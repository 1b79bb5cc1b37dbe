# SPDX-License-Identifier: Apache-2.0
"""One training step whose backward pass is the optimizer's step, too."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import optax

from optax_mp.backward import _checks
from optax_mp.backward import _gradients
from optax_mp.backward import _step
from optax_mp.backward import _walk
from optax_mp.formats import _layout


@dataclasses.dataclass(frozen=True)
class FusedStep:
  """A training step; see :func:`fused_step`."""

  loss_fn: Callable[..., Any]
  block_fn: Any
  tx: optax.GradientTransformation
  max_norm: float | None = None
  norm_mode: Literal['exact', 'previous'] = 'exact'
  skip_nonfinite: bool = False
  has_aux: bool = False
  policy: Callable[..., Any] | None = None

  def __post_init__(self):
    _checks.arguments(self)

  @property
  def names(self) -> tuple[str, ...]:
    """Of the stacks; of a single one ''."""
    if isinstance(self.block_fn, Mapping):
      return tuple(sorted(self.block_fn))
    return ('',)

  def init(self, rest: optax.Params, stack: optax.Params) -> _step.FusedState:
    """The state before the first step.

    Args:
      rest: parameters outside the stack.
      stack: those of the layers, or a dict of stacks.

    Returns:
      The state, each array sharded like its parameter.
    """
    stacks = self._stacks(rest, stack)

    @jax.jit
    def build(rest, stacks):
      state = _layout.lay_out(self.tx.init(rest), rest)
      return state, {
        name: _layout.lay_out(jax.vmap(self.tx.init)(each), each)
        for name, each in stacks.items()
      }

    rest_state, states = build(rest, stacks)
    _checks.accumulation((rest_state, states))
    norm, finite = jnp.zeros((), jnp.float32), jnp.ones((), jnp.bool)
    return _step.FusedState(rest_state, self._unnamed(states), norm, finite)

  def loss(self, rest: optax.Params, stack: optax.Params, *batch: Any) -> Any:
    """What ``loss_fn`` returns, without a step; differentiable as usual.

    Args:
      rest: parameters outside the stack.
      stack: those of the layers, or a dict of stacks.
      *batch: for ``loss_fn``.

    Returns:
      The loss, with ``has_aux`` the loss and what comes with it.
    """
    stacks = self._stacks(rest, stack)
    blocks = {
      name: _walk.Blocks(name, self._function(name), self.policy, each)
      for name, each in stacks.items()
    }
    return self.loss_fn(rest, self._unnamed(blocks), *batch)

  def __call__(
    self,
    rest: optax.Params,
    stack: optax.Params,
    state: _step.FusedState,
    *batch: Any,
    loss_scale: chex.Numeric | None = None,
  ) -> tuple[optax.Params, optax.Params, _step.FusedState, Any]:
    """One step: everything new, and the loss before it.

    Args:
      rest: parameters outside the stack.
      stack: those of the layers, or a dict of stacks.
      state: of ``init``, or of the step before.
      *batch: for ``loss_fn``.
      loss_scale: for float16: gradients are those of the loss times this, and
        divided by it in float32, layer by layer, before ``tx``.

    Returns:
      ``(rest, stack, state, loss)``, in place of the loss ``(loss, aux)`` with
      ``has_aux``.
    """
    stacks = self._stacks(rest, stack)
    _checks.state(state, _step.FusedState)
    _checks.accumulation(state)
    rest, stacks, new_state, loss = _step.take(
      self._options(loss_scale is not None),
      lambda rest, blocks: self.loss_fn(rest, self._unnamed(blocks), *batch),
      {name: self._function(name) for name in self.names},
      rest, stacks, state._replace(stack=self._named(state.stack)), loss_scale,
    )  # fmt: skip
    taken_state = new_state._replace(stack=self._unnamed(new_state.stack))
    return rest, self._unnamed(stacks), taken_state, loss

  def _options(self, scaled: bool) -> _step.Options:
    tx = optax.with_extra_args_support(self.tx)
    update = _gradients.Update(tx, self.max_norm, self.skip_nonfinite, scaled)
    previous = self.norm_mode == 'previous'
    return _step.Options(update, self.policy, previous, self.has_aux)

  def _stacks(self, rest: Any, stack: Any) -> dict[str, Any]:
    _checks.rest(rest)
    if isinstance(self.block_fn, Mapping):
      _checks.named(stack, self.names)
    stacks = self._named(stack)
    _checks.stacks(stacks)
    return stacks

  def _named(self, tree: Any) -> dict[str, Any]:
    if isinstance(self.block_fn, Mapping):
      return {name: tree[name] for name in self.names}
    return {'': tree}

  def _unnamed(self, trees: dict[str, Any]) -> Any:
    return trees if isinstance(self.block_fn, Mapping) else trees['']

  def _function(self, name: str) -> Callable[..., Any]:
    mapped = isinstance(self.block_fn, Mapping)
    return self.block_fn[name] if mapped else self.block_fn



def fused_step(
  loss_fn: Callable[..., Any],
  block_fn: Callable[..., Any] | Mapping[str, Callable[..., Any]],
  tx: optax.GradientTransformation,
  *,
  max_norm: float | None = None,
  norm_mode: Literal['exact', 'previous'] = 'exact',
  skip_nonfinite: bool = False,
  has_aux: bool = False,
  policy: Callable[..., Any] | None = None,
) -> FusedStep:
  """TODO."""
  return FusedStep(
    loss_fn, block_fn, tx, max_norm, norm_mode, skip_nonfinite, has_aux, policy
  )
