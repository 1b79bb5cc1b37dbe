# SPDX-License-Identifier: Apache-2.0
"""One training step whose backward pass is the optimizer's step, too."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Literal

import chex
import optax

from optax_mp.backward import _checks
from optax_mp.backward import _gradients
from optax_mp.backward import _step
from optax_mp.backward import _walk


@dataclasses.dataclass(frozen=True, eq=False)  # `jax.jit` wants a hash
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

    rest_state, states, *scalars = _step.initial(self.tx, rest, stacks)
    _checks.accumulation((rest_state, states))
    return _step.FusedState(rest_state, self._unnamed(states), *scalars)

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
    functions = self._named(self.block_fn)
    blocks = {
      name: _walk.Blocks(name, functions[name], self.policy, each).__call__
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
  ) -> tuple[Any, Any, _step.FusedState, Any]:
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
    (rest, stacks, loss), parts = _step.take(
      self._options(loss_scale is not None),
      lambda rest, blocks: self.loss_fn(rest, self._unnamed(blocks), *batch),
      self._named(self.block_fn),
      rest, stacks, state, self._named(state.stack), loss_scale,
    )  # fmt: skip
    rest_state, states, *scalars = parts
    state = _step.FusedState(rest_state, self._unnamed(states), *scalars)
    return rest, self._unnamed(stacks), state, loss

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
  r"""A training step that updates each layer as soon as its gradient is there.

  For a model whose layers are stacked and scanned. The forward pass keeps the
  input of each layer. The backward pass goes from the last layer to the first:
  it runs layer l again and takes its gradient, updates its parameters and its
  state in place, and goes on with the gradient of what came in,

  .. math::
    (g_l, \bar h_l) &= \mathrm{vjp}(\mathrm{block}, x_l, h_l)(\bar h_{l+1}), \\
    (u_l, s_l) &\leftarrow \mathrm{tx}(g_l, s_l, x_l), \qquad
    x_l \leftarrow x_l + u_l.

  So gradients take the bytes of one layer, not of all. Then ``rest``, which is
  embeddings, head and norms, is updated by the same ``tx``, as a whole.

  Args:
    loss_fn: ``loss_fn(rest, blocks, *batch) -> loss``. It calls
      ``h = blocks(h, *args)`` once, itself and not inside another ``jit``,
      ``scan`` or ``checkpoint``. ``h`` is any pytree. ``args`` are given to all
      layers: masks, positions, an encoder's output, which gets its gradient;
      what is no array (``True``) is a constant. Of ``blocks(h, scanned=(x,))``
      each layer gets its own ``x[l]``, after ``args``: keys for dropout.
    block_fn: ``block_fn(layer_params, h, *args) -> h``, one layer. Or a dict
      of such; then ``stack``, ``state.stack`` and ``blocks`` are dicts, too:
      ``blocks['encoder'](h)``.
    tx: any Optax transformation. It sees one layer at a time, its leaves
      without the axis of layers, and ``layer=``, its number: :func:`compressed`
      and :func:`compensated` have other noise in each, and ``optax.add_noise``
      other keys. It is the place for weight decay.
    max_norm: gradients are clipped to this global norm, that of all layers and
      of the rest together.
    norm_mode: 'exact': like ``optax.clip_by_global_norm`` before ``tx``, by a
      second backward pass; the first one only adds up squares. 'previous': by
      the norm of the last step, ``state.last_norm``, in one pass; the first
      step is not clipped.
    skip_nonfinite: if any gradient is not finite, or would make a parameter or
      a state infinite or NaN, everything but ``state.total_notfinite`` stays as
      it is, bit for bit, counts, too. Takes the pass that 'exact' takes, once
      for both; with 'exact' the norm stands for parameters and states, since
      what is clipped by it is not known in that pass.
    has_aux: ``loss_fn`` returns ``(loss, aux)``, and so does the step.
    policy: of ``jax.checkpoint``, for what a layer keeps while it is
      differentiated; None: what it needs.

  Returns:
    A :class:`FusedStep`: ``state = step.init(rest, stack)``, then
    ``rest, stack, state, loss = step(rest, stack, state, *batch)``. Call it
    under ``jax.jit`` with ``donate_argnums=(0, 1, 2)``: else nothing is saved.
    On a mesh, of Auto or Explicit axes, everything stays where it lies.
    ``step.loss(rest, stack, *batch)`` is the loss alone.

  Raises:
    ValueError: for options that are none; in ``init`` and while tracing, if
      the leaves of a stack have no common first axis, or are no floats; if
      ``blocks`` is not called exactly once; if ``block_fn`` does not return
      what ``h`` is like; if ``tx`` accumulates gradients, as
      ``optax.MultiSteps`` does.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optax_mp
    >>> def block_fn(layer, h):
    ...   return h + jnp.tanh(h @ layer['w'])
    >>> def loss_fn(rest, blocks, x, y):
    ...   return jnp.mean((blocks(x) @ rest['head'] - y) ** 2)
    >>> step = optax_mp.backward.fused_step(loss_fn, block_fn, optax.adam(1e-2))
    >>> stack = {'w': jnp.zeros((12, 4, 4))}  # twelve layers
    >>> rest = {'head': jnp.eye(4)}
    >>> state = step.init(rest, stack)
    >>> train = jax.jit(step, donate_argnums=(0, 1, 2))
    >>> x, y = jnp.ones((8, 4)), jnp.zeros((8, 4))
    >>> for _ in range(50):
    ...   rest, stack, state, loss = train(rest, stack, state, x, y)
    >>> print(f'{loss:.4f}')
    0.0000

  **Savings:** the gradients of all layers but one: 2 bytes per parameter in
  bfloat16, 4 in float32.

  **Caveats:** what ``tx`` itself takes over the whole tree it takes over one
  layer, or over the rest: ``optax.clip_by_global_norm`` (use ``max_norm``),
  ``optax.apply_if_finite`` (use ``skip_nonfinite``), statistics over all
  leaves, ``min_size``. Masks, labels and ``matrices`` must be functions of a
  tree and not trees. It also changes what is per leaf in a stack: Adafactor's
  and LAMB's norms are of a layer's matrix, which they are meant for. With
  ``max_norm`` 'exact' or ``skip_nonfinite`` a step recomputes each layer and
  goes back through it twice. A gradient of 16 bits reaches ``tx`` as it is;
  with a ``loss_scale`` in float32.

  References:
    Lv et al., `Full Parameter Fine-tuning for Large Language Models with
    Limited Resources <https://arxiv.org/abs/2306.09782>`_, 2023;
    Lewandowski and Kosson, `Memory Efficient Mixed-Precision Optimizers
    <https://arxiv.org/abs/2309.12381>`_, 2023
  """
  return FusedStep(
    loss_fn, block_fn, tx, max_norm, norm_mode, skip_nonfinite, has_aux, policy
  )
