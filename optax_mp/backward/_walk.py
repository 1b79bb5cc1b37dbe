# SPDX-License-Identifier: Apache-2.0
"""One stack of layers: forward, and backward with something done to each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from optax_mp.backward import _checks
from optax_mp.backward import _parts


class Inputs(NamedTuple):
  """What a layer is given beside its parameters: lists of arrays."""

  h: list[Any]  # from the layer before
  args: list[Any]  # the same for every layer
  scanned: list[Any]  # of its own


class Saved(NamedTuple):
  """What the backward pass needs of the forward pass."""

  hs: _parts.Parts  # the inputs of all layers, stacked
  floats: Inputs
  others: Inputs


class Layer(NamedTuple):
  """A ``block_fn`` on lists of arrays, ``(params, floats, others) -> h``."""

  apply: Callable[[Any, Inputs, Inputs], _parts.Parts]
  again: Callable[[Any, Inputs, Inputs], _parts.Parts]  # in the backward pass


def layer_of(
  block_fn: Callable[..., Any], policy: Any, h: Any, args: Any, scanned: Any
) -> tuple[Layer, Inputs, Inputs, Callable[[_parts.Parts], Any]]:
  """The layer, what it is given, and what makes ``h`` of its parts."""
  parts, merges = zip(*map(_parts.split, (h, args, scanned)), strict=True)
  floats = Inputs(*(part.floats for part in parts))
  others = Inputs(*(part.others for part in parts))

  def apply(params, floats, others):
    h, args, scanned = (
      merge(_parts.Parts(*part))
      for merge, *part in zip(merges, floats, others, strict=True)
    )
    out = block_fn(params, h, *args, *scanned)
    _checks.same_h(out, h)
    return _parts.split(out)[0]

  again = apply if policy is None else jax.checkpoint(apply, policy=policy)
  return Layer(apply, again), floats, others, merges[0]


def forward(
  layer: Layer, stack: Any, floats: Inputs, others: Inputs, visible: bool
) -> tuple[_parts.Parts, _parts.Parts]:
  """Runs all layers -> (the last one's output, the inputs of all)."""
  seen = (lambda params: params) if visible else unseen()

  def body(h, x):
    params, scanned, scanned_others = x
    new = layer.apply(
      seen(params),
      Inputs(h.floats, floats.args, scanned),
      Inputs(h.others, others.args, scanned_others),
    )
    return new, h

  start = _parts.Parts(floats.h, others.h)
  return lax.scan(body, start, (stack, floats.scanned, others.scanned))


def gradients(
  layer: Layer, params: Any, floats: Inputs, others: Inputs, cotangent: Any
) -> tuple[Any, Inputs]:
  """Of one layer: those of its parameters, and of its inputs."""
  _, pull = jax.vjp(
    lambda params, floats: layer.again(params, floats, others).floats,
    params,
    floats,
  )
  return pull(cotangent)


def backward(
  layer: Layer,
  length: int,
  saved: Saved,
  cotangent: list[Any],
  visit: Callable[..., Any],
  carry: Any,
) -> tuple[Inputs, Any]:
  """Walks the layers from the last to the first.

  Args:
    layer: of this stack.
    length: how many there are.
    saved: the inputs of all layers, and what all of them are given.
    cotangent: of the last layer's output.
    visit: ``visit(carry, i, gradients_of)`` is called for each; with the
      parameters, ``gradients_of`` returns their gradients and remembers those
      of the inputs.
    carry: what ``visit`` is given first.

  Returns:
    Cotangents of the inputs, and what ``visit`` returned last.
  """
  hs, floats, others = saved
  layers = jnp.arange(length)

  def body(c, x):
    cotangent, total, carry = c
    i, h, scanned, scanned_others = x
    here = Inputs(h.floats, floats.args, scanned)
    here_others = Inputs(h.others, others.args, scanned_others)

    def gradients_of(params):
      own, back = gradients(layer, params, here, here_others, cotangent)
      remembered.append(back)
      return own

    remembered: list[Inputs] = []
    carry = visit(carry, i, gradients_of)
    (back,) = remembered
    total = jax.tree.map(jnp.add, total, back.args)
    return (back.h, total, carry), back.scanned

  start = (cotangent, jax.tree.map(jnp.zeros_like, floats.args), carry)
  (h, args, carry), scanned = lax.scan(
    body, start, (layers, hs, floats.scanned, others.scanned), reverse=True
  )
  return Inputs(h, args, scanned), carry


def unseen() -> Callable[[Any], Any]:
  """Hides from XLA:TPU that a loop reads float32 weights as they are.

  Else it takes their conversion to bfloat16 out of the loop, and makes a copy
  of all weights at once. A barrier around them does not keep it from that: it
  is gone when loops are looked at. So a zero is added to their bits, of which
  XLA does not know that it is one.
  """
  zero = lax.optimization_barrier(jnp.zeros((), jnp.uint32))

  def add(x, zero):
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type(bits + zero, x.dtype)

  def hide(x):
    if x.dtype != jnp.float32:
      return x
    return lax.platform_dependent(x, zero, tpu=add, default=lambda x, _: x)

  return lambda params: jax.tree.map(hide, params)


class Blocks:
  """What ``loss_fn`` calls to run one stack: ``blocks(h, *args)``.

  Differentiable as usual; a subclass does something else in the backward pass.
  """

  def __init__(self, name: str, block_fn: Any, policy: Any, stack: Any):
    self.name = name
    self.block_fn = block_fn
    self.policy = policy
    self.stack = stack
    self.length = jax.tree.leaves(stack)[0].shape[0]
    self.calls = 0

  def __call__(self, h: Any, *args: Any, scanned: Any = ()) -> Any:
    """Runs the layers in order.

    Args:
      h: what the first layer is given: any pytree.
      *args: given to every layer.
      scanned: arrays with an axis for the layers, of each of which a layer is
        given its own.

    Returns:
      What the last layer returns.
    """
    self.calls += 1
    _checks.first_call(self)
    _checks.scanned(scanned, self.length)
    layer, floats, others, merge = layer_of(
      self.block_fn, self.policy, h, args, scanned
    )
    return merge(self.run(layer, floats, others))

  def run(self, layer: Layer, floats: Inputs, others: Inputs) -> _parts.Parts:
    """The last layer's output."""
    apply = jax.checkpoint(layer.apply, policy=self.policy)
    layer = Layer(apply, apply)
    return forward(layer, self.stack, floats, others, visible=True)[0]
