# SPDX-License-Identifier: Apache-2.0
"""The two passes over a stack: one sums gradients, one updates with them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from optax_mp.backward import _checks
from optax_mp.backward import _gradients
from optax_mp.backward import _parts
from optax_mp.backward import _walk


class Pass(NamedTuple):
  """What the next backward pass does."""

  wanted: _gradients.Wanted  # which sums it returns
  updates: bool


class FusedBlocks(_walk.Blocks):
  """Blocks whose backward pass updates the parameters and their state.

  It cannot return them: a cotangent has the dtype of what it belongs to, and
  integers have none. So they are in references.

  The backward pass of a ``custom_vjp`` is traced each time that it is asked
  for, so that one forward pass serves two, the first for sums alone.
  """

  trace: Any = None  # in which it must be called
  # Scalars whose cotangents are what a pass has summed, and what it is told.
  sums: Any = None
  control: Any = None
  next_pass: Any = None

  def __init__(
    self,
    name: str,
    block_fn: Callable[..., Any],
    policy: Any,
    stack: Any,
    refs: Any,
    first: int,
    update: _gradients.Update,
  ):
    super().__init__(name, block_fn, policy, stack)
    self.refs = refs  # of the parameters and of their state
    self.first = first  # the number of its first layer among those of all
    self.update = update

  def run(
    self, layer: _walk.Layer, floats: _walk.Inputs, others: _walk.Inputs
  ) -> _parts.Parts:
    """The last layer's output; remembers the handle of the backward pass."""
    _checks.called_directly(self.trace)

    def fwd(sums, stack, floats, others):
      del sums
      out, hs = _walk.forward(layer, stack, floats, others, visible=False)
      saved = _walk.Saved(hs, floats, others)
      return (out, _gradients.Control.zeros()), saved

    def bwd(saved, cotangents):
      out, control = cotangents
      now, self.next_pass = self.next_pass, None
      visit = self._updated if now.updates else self._summed
      back, sums = visit(layer, saved, out.floats, control, now.wanted)
      return sums, None, back, None

    run = jax.custom_vjp(lambda *args: fwd(*args)[0])
    run.defvjp(fwd, bwd)
    # The two scalars make sure that there is a backward pass, even if `h` does
    # not depend on a parameter, or the loss not on what the layers return.
    out, self.control = run(self.sums, self.stack, floats, others)
    return out

  def _summed(self, layer, saved, cotangent, control, wanted):
    """Adds up what is wanted of the gradients, one layer at a time."""
    seen = _walk.unseen()
    stack, states = jax.tree.map(lambda ref: ref[...], self.refs)

    def visit(sums, i, gradients_of):
      params = seen(_parts.at(stack, i))
      own = gradients_of(params)
      sums = _gradients.summed(own, sums, wanted)
      if not wanted.state:
        return sums
      finite = self.update.is_finite(
        params, _parts.at(states, i), own, control, layer=self._number(i)
      )
      bad = jnp.where(finite, 0.0, 1.0)
      return sums._replace(not_finite=sums.not_finite + bad)

    start = _gradients.Sums.zeros()
    return _walk.backward(layer, self.length, saved, cotangent, visit, start)

  def _updated(self, layer, saved, cotangent, control, wanted):
    """Updates each layer as soon as its gradient is there."""

    def visit(carry, i, gradients_of):
      stacks, sums = carry
      params, state = _parts.at(stacks, i)
      own = gradients_of(params)
      sums = _gradients.summed(own, sums, wanted)
      new = self._update(i, params, state, own, control)
      return _parts.put(stacks, i, new), sums

    # A loop carry, and not the references themselves: these cannot be indexed
    # where a mesh has explicit axes, and XLA makes the same program of both.
    stacks = jax.tree.map(lambda ref: ref[...], self.refs)
    start = (stacks, _gradients.Sums.zeros())
    back, (stacks, sums) = _walk.backward(
      layer, self.length, saved, cotangent, visit, start
    )
    for ref, new in zip(
      jax.tree.leaves(self.refs), jax.tree.leaves(stacks), strict=True
    ):
      ref[...] = new
    return back, sums

  def _update(self, i, *args):
    """Updates layer ``i``; on a CPU all of its arrays before any is written.

    XLA:CPU has no fusion of several outputs: each would read the old arrays
    where they lie, and for that it would copy them in every turn of the loop,
    all layers of them. It does not fuse what is in a branch, and does not know
    that there is only one.
    """

    def update(*args):
      return self.update(*args, layer=self._number(i))

    def in_branch(*args):
      return lax.cond(i >= 0, update, lambda *args: args[:2], *args)

    return lax.platform_dependent(*args, cpu=in_branch, default=update)

  def _number(self, i):
    """Of layer ``i`` among those of all stacks."""
    return (self.first + i).astype(jnp.uint32)
