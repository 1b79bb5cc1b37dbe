# SPDX-License-Identifier: Apache-2.0
"""What cannot work, said while tracing and not by a wrong result."""

from collections.abc import Mapping
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_mp._core import _traces
from optax_mp.formats import _base
from optax_mp.formats import _paths

_ACCUMULATION = (
  'accumulates gradients, in an array as large as the parameters: what a step '
  'inside the backward pass is there to avoid. Use a larger batch, since only '
  'one layer is recomputed at a time; or `optax.MultiSteps` with '
  '`jax.value_and_grad`, the ordinary step.'
)


def arguments(step: Any) -> None:
  """Raises a ValueError for options that are none."""
  functions = {'loss_fn': step.loss_fn}
  if isinstance(step.block_fn, Mapping):
    functions |= {f'block_fn[{k!r}]': f for k, f in step.block_fn.items()}
  else:
    functions['block_fn'] = step.block_fn
  for name, function in functions.items():
    if not callable(function):
      raise ValueError(f'`{name}` must be a function; got {function!r}.')
  if not step.names:
    raise ValueError(
      '`block_fn` must name a function for each stack; got an empty mapping. '
      'Without a stack, use `jax.value_and_grad`.'
    )
  if isinstance(step.tx, optax.MultiSteps):
    raise ValueError(f'`tx`: got `optax.MultiSteps`, which {_ACCUMULATION}')
  if not (hasattr(step.tx, 'init') and hasattr(step.tx, 'update')):
    raise ValueError(
      '`tx` must be an Optax transformation such as `optax.adam(1e-3)`; got '
      f'{step.tx!r}.'
    )
  _base.check_choice(step.norm_mode, 'norm_mode', ('exact', 'previous'))
  _max_norm(step.max_norm, step.norm_mode)
  if step.policy is not None and not callable(step.policy):
    raise ValueError(
      '`policy` must be one of `jax.checkpoint_policies`, or None; got '
      f'{step.policy!r}.'
    )


def _max_norm(max_norm: Any, norm_mode: str) -> None:
  if max_norm is None:
    if norm_mode != 'exact':
      raise ValueError(
        f'`norm_mode` does nothing without `max_norm`; got {norm_mode!r} and '
        'None. Give the norm to clip at, or leave out `norm_mode`.'
      )
    return
  number = isinstance(max_norm, numbers.Real)
  if not number or isinstance(max_norm, bool) or not float(max_norm) > 0:
    raise ValueError(
      '`max_norm` must be a positive number of Python, or None for no '
      f'clipping; got {max_norm!r}.'
    )


def stacks(stacks: dict[str, Any]) -> None:
  """Raises a ValueError unless each is a stack of trainable layers."""
  for name, stack in stacks.items():
    where = f'`stack[{name!r}]`' if name else '`stack`'
    leaves = jax.tree_util.tree_leaves_with_path(stack)
    if not leaves:
      raise ValueError(
        f'{where} must have arrays; got none. Without a stack, use '
        '`jax.value_and_grad`.'
      )
    _floats(leaves, where)
    lengths = {
      _paths.path_str(path): leaf.shape[0] if leaf.ndim else None
      for path, leaf in leaves
    }
    if len(set(lengths.values())) > 1 or not all(lengths.values()):
      raise ValueError(
        f'{where} must have the same number of layers, one or more, along the '
        f'first axis of every leaf; got {lengths}. Stack the layers with '
        '`jax.tree.map(lambda *x: jnp.stack(x), *layers)`; what is not stacked '
        'belongs in `rest`.'
      )


def rest(rest: Any) -> None:
  """Raises a ValueError for what cannot be trained."""
  _floats(jax.tree_util.tree_leaves_with_path(rest), '`rest`')


def _floats(leaves: list[tuple[Any, Any]], where: str) -> None:
  for path, leaf in leaves:
    dtype = getattr(leaf, 'dtype', None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f'{where} must be parameters, arrays of real floats; got '
        f'{dtype or type(leaf).__name__} at {_paths.path_str(path)!r}. Pass it '
        'with the batch, and to the layers as an argument of `blocks`; train '
        'complex parameters as pairs of real ones.'
      )


def accumulation(state: Any) -> None:
  """Raises a ValueError if the state of ``tx`` keeps a sum of gradients."""
  kinds = (optax.MultiStepsState, optax.ApplyEvery)
  nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds))
  for node in nodes:
    if isinstance(node, kinds):
      name = type(node).__name__
      raise ValueError(f'`tx` has a state {name}: it {_ACCUMULATION}')


def state(state: Any, expected: type[Any]) -> None:
  """Raises a ValueError unless it is what ``init`` returned."""
  if not isinstance(state, expected):
    raise ValueError(
      f'`state` must be the {expected.__name__} that `init(rest, stack)` '
      f'returned; got a {type(state).__name__}.'
    )


def named(stack: Any, names: tuple[str, ...]) -> None:
  """Raises a ValueError unless there is a stack for each ``block_fn``."""
  if not isinstance(stack, Mapping) or set(stack) != set(names):
    got = sorted(stack) if isinstance(stack, Mapping) else type(stack).__name__
    raise ValueError(
      f'`stack` must be a dict with the keys of `block_fn`, {sorted(names)}; '
      f'got {got}.'
    )


def first_call(blocks: Any) -> None:
  """Raises a ValueError if a stack is run twice."""
  if blocks.calls > 1:
    raise ValueError(
      f'`loss_fn` must call {_called(blocks.name)} once; it called it twice, '
      'and the second backward pass would update what the first has updated '
      'already. For layers that are used twice, let `block_fn` use them twice, '
      'or use `jax.value_and_grad`.'
    )


def called(blocks: dict[str, Any]) -> None:
  """Raises a ValueError for a stack that was not run."""
  for name, each in blocks.items():
    if not each.calls:
      raise ValueError(
        f'`loss_fn` must call {_called(name)} once; it never did, so that '
        'stack would not be trained.'
      )


def called_directly(expected: Any) -> None:
  """Raises a ValueError in a trace inside that of ``loss_fn``.

  What such a call returns is differentiated elsewhere and perhaps more than
  once, so layers would silently not be updated, or updated twice.
  """
  if _traces.current() != expected:
    raise ValueError(
      '`loss_fn` must call `blocks(h, ...)` itself; got a call inside a `jit`, '
      '`checkpoint`, `scan`, `cond` or `vmap` within it. Leave that around '
      'what comes before and after the call.'
    )


def _called(name: str) -> str:
  return f'`blocks[{name!r}](h, ...)`' if name else '`blocks(h, ...)`'


def same_h(out: Any, h: Any) -> None:
  """Raises a ValueError if a layer does not return what it was given."""
  if _avals(out) != _avals(h):
    raise ValueError(
      '`block_fn` must return `h` with the structure, shapes and dtypes that '
      f'it is given; got {_avals(h)[1]} and it returned {_avals(out)[1]}. Cast '
      'what it returns, or `h` before `blocks(h)`.'
    )


def loss(loss: Any) -> None:
  """Raises a ValueError unless it is a real number."""
  dtype = getattr(loss, 'dtype', None)
  scalar = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
  if not scalar or loss.shape != ():
    raise ValueError(
      '`loss_fn` must return a scalar, or with `has_aux=True` a pair of a '
      f'scalar and something else; got {_avals(loss)[1]}.'
    )


def scanned(scanned: Any, length: int) -> None:
  """Raises a ValueError unless there is one for each layer."""
  for leaf in jax.tree.leaves(scanned):
    shape = getattr(leaf, 'shape', ())
    if not shape or shape[0] != length:
      raise ValueError(
        f'`scanned` must have a first axis of {length} layers; got {shape}. '
        'What is the same for all layers is a positional argument.'
      )


def same_state(new: Any, old: Any) -> None:
  """Raises a ValueError if an update changes what kind of arrays it keeps."""
  if _avals(new) != _avals(old):
    raise ValueError(
      '`tx` must keep the structure, shapes and dtypes of its state; got '
      f'{_avals(old)[1]} and after `update` {_avals(new)[1]}. Where it is the '
      'dtype that differs, gradients have another one than parameters, such as '
      'float32 with `loss_scale`: let `optax_mp.compensated` take them, or '
      'train float32 parameters. All of a state must be arrays.'
    )


def _avals(tree: Any) -> tuple[Any, list[str]]:
  leaves, treedef = jax.tree.flatten(tree)
  described = [
    f'{x.dtype}{list(x.shape)}' if hasattr(x, 'dtype') else repr(x)
    for x in leaves
  ]
  return treedef, described
