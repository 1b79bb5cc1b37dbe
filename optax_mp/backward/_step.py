# SPDX-License-Identifier: Apache-2.0
"""One step while it is traced: forward, backward once or twice, the rest."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_mp._core import _barriers
from optax_mp._core import _traces
from optax_mp.backward import _checks
from optax_mp.backward import _gradients
from optax_mp.backward import _parts
from optax_mp.backward import _passes
from optax_mp.formats import _layout


class FusedState(NamedTuple):
  """The optimizer states of ``rest`` and of every layer."""

  rest: optax.OptState
  stack: optax.OptState  # every array with a first axis, a layer each
  last_norm: chex.Array  # (), float32: of all gradients; 0 if not asked for
  total_notfinite: chex.Array  # (), int32: how many steps were skipped


class Options(NamedTuple):
  """Of a step, as :func:`fused_step` has them."""

  update: _gradients.Update
  policy: Callable[..., Any] | None
  previous: bool  # whether to clip by the norm of the step before
  has_aux: bool

  @property
  def measured(self) -> _gradients.Wanted:
    """What must be known of all gradients before the first update."""
    norm = self.update.max_norm is not None and not self.previous
    # A gradient that is clipped to a norm not known yet makes no state yet.
    ahead = self.update.guarded and not norm
    return _gradients.Wanted(norm, self.update.guarded, ahead)

  @property
  def noted(self) -> _gradients.Wanted:
    """What the pass that updates sums up for the next step."""
    return _gradients.Wanted(self.previous, False, False)


class Backward:
  """The forward pass, done, and backward passes from there."""

  def __init__(self, options: Options, loss_fn, blocks, rest, scale):
    self.options, self.blocks = options, blocks
    self.scale = jnp.asarray(1.0 if scale is None else scale, jnp.float32)

    def run(rest, sums):
      here = _traces.current()
      for each in blocks.values():
        each.sums, each.trace = sums, here
      # Methods alone: parameters are not for `loss_fn`, which would see them
      # without their gradients.
      out = loss_fn(rest, {k: each.__call__ for k, each in blocks.items()})
      loss, aux = out if options.has_aux else (out, ())
      _checks.called(blocks)
      _checks.loss(loss)
      return (loss, [each.control for each in blocks.values()]), aux

    (self.loss, _), self.pull, self.aux = jax.vjp(
      run, rest, _gradients.Sums.zeros(), has_aux=True
    )

  def measure(
    self, norm: chex.Array
  ) -> tuple[Any, chex.Array, chex.Array, _gradients.Control]:
    """Gradients of the rest, norm of all, whether all are finite, control."""
    control = _gradients.Control(self.scale, norm, jnp.ones((), jnp.float32))
    return *self._pass(control, self.options.measured), control

  def update(self, norm, finite) -> tuple[Any, chex.Array, _gradients.Control]:
    """Updates all layers -> gradients of the rest, norm of all, control."""
    finite = finite.astype(jnp.float32)
    control = _gradients.Control(self.scale, norm, finite)
    rest, norm, _ = self._pass(control, self.options.noted, updates=True)
    return rest, norm, control

  def _pass(self, control, wanted, updates=False):
    for each in self.blocks.values():
      each.next_pass = _passes.Pass(wanted, updates)
    start = self.scale.astype(self.loss.dtype)
    rest, sums = self.pull((start, [control] * len(self.blocks)))
    assert all(each.next_pass is None for each in self.blocks.values())
    sums = _gradients.summed(rest, sums, wanted)
    return rest, jnp.sqrt(sums.squares) / self.scale, sums.not_finite == 0


def initial(
  tx: optax.GradientTransformation, rest: Any, stacks: dict[str, Any]
) -> tuple[Any, dict[str, Any], chex.Array, chex.Array]:
  """The parts of the state before the first step.

  Args:
    tx: of all.
    rest: parameters outside the stacks.
    stacks: parameters of the layers.

  Returns:
    The states of both, sharded like their parameters, and the two scalars,
    which lie on the same devices.
  """

  @jax.jit
  def build(rest, stacks):
    states, first = {}, 0
    for name, stack in stacks.items():
      state = _parts.with_own_noise(jax.vmap(tx.init)(stack), first)
      states[name] = _layout.lay_out(state, stack)
      first += len(jax.tree.leaves(stack)[0])
    rest_state = _layout.lay_out(tx.init(rest), rest)
    norm, count = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    return rest_state, states, norm, count

  return build(rest, stacks)


def take(
  options: Options,
  loss_fn: Callable[[Any, dict[str, Any]], Any],
  functions: dict[str, Callable[..., Any]],
  rest: Any,
  stacks: dict[str, Any],
  state: FusedState,
  states: dict[str, Any],
  scale: Any,
) -> tuple[tuple[Any, dict[str, Any], Any], tuple[Any, ...]]:
  """One step.

  Args:
    options: of the step.
    loss_fn: ``loss_fn(rest, blocks)``.
    functions: the ``block_fn`` of each stack.
    rest: parameters outside the stacks.
    stacks: parameters of the layers.
    state: of the step before.
    states: those of the layers, for each stack.
    scale: of the loss, or None.

  Returns:
    New parameters and what ``loss_fn`` returned; the parts of a new state.
  """
  blocks: dict[str, _passes.FusedBlocks] = {}
  first = 0
  for name, stack in stacks.items():
    refs = jax.tree.map(jax.new_ref, (stack, states[name]))
    blocks[name] = _passes.FusedBlocks(
      name, functions[name], options.policy, stack, refs, first, options.update
    )
    first += blocks[name].length
  backward = Backward(options, loss_fn, blocks, rest, scale)
  norm, finite = state.last_norm, jnp.ones((), jnp.bool)
  gradients = None
  if any(options.measured):
    gradients, measured, finite, control = backward.measure(norm)
    if options.measured.norm:
      norm, finite = measured, finite & jnp.isfinite(measured)
    if options.measured.state:
      apart, rest_state = _barriers.told_apart((rest, state.rest))
      own = options.update.is_finite(apart, rest_state, gradients, control)
      finite = jnp.logical_and(finite, own)
  again, noted, control = backward.update(norm, finite)
  # Those of the first pass are the same, and with them nobody needs these.
  gradients = again if gradients is None else gradients
  rest, rest_state = options.update(rest, state.rest, gradients, control)
  if options.previous:
    # One that is not finite would clip all later gradients away.
    norm = jnp.where(jnp.isfinite(noted), noted, norm)
  norm = jnp.where(finite, norm, state.last_norm)
  frozen = {
    name: jax.tree.map(jax.freeze, each.refs) for name, each in blocks.items()
  }
  count = state.total_notfinite + jnp.logical_not(finite).astype(jnp.int32)
  loss = (backward.loss, backward.aux) if options.has_aux else backward.loss
  stacks = {name: stack for name, (stack, _) in frozen.items()}
  states = {name: new for name, (_, new) in frozen.items()}
  return (rest, stacks, loss), (rest_state, states, norm, count)
