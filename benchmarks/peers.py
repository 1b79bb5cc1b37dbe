# SPDX-License-Identifier: Apache-2.0
"""AdamW of other libraries, and how one step of any of them is timed.

A new peer is one row of `PEERS`. None has to be installed. All take the
hyperparameters of the family 'adamw' and are otherwise as their authors leave
them, with bfloat16 parameters and gradients unless a row says float32.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import importlib
import importlib.metadata
import math
import os
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from contenders import FAMILIES

Shapes = Sequence[tuple[int, ...]]


class Run(Protocol):
  """An optimizer with its arrays on the device, ready to be timed."""

  def prepare(self) -> None:
    """What a step needs that is not part of it."""

  def step(self) -> None:
    """One step; returns when it is done."""

  def num_bytes(self) -> float:
    """Of parameters, state and gradients, after a step."""
    ...


@dataclasses.dataclass(frozen=True)
class JaxOptimizer:
  """Functions of JAX arrays: they can be compiled for what is not here."""

  init: Callable[..., Any]  # params -> state
  step: Callable[..., Any]  # params, state, grads -> params, state
  dtype: Any  # of parameters and gradients

  def arguments(self, shapes: Shapes) -> tuple[Any, Any, Any]:
    """Shapes of parameters, state and gradients."""
    params = [jax.ShapeDtypeStruct(shape, self.dtype) for shape in shapes]
    return params, jax.eval_shape(self.init, params), params

  def run(self, shapes: Shapes) -> Run:
    """Allocates, and compiles at the first step."""
    return _JaxRun(self, shapes)


class _JaxRun:
  """Parameters and state are donated, so each step takes the last one's."""

  def __init__(self, optimizer: JaxOptimizer, shapes: Shapes):
    params, grads = (
      [jnp.asarray(x, optimizer.dtype) for x in numbers]
      for numbers in _numbers(shapes)
    )
    # An initial state may name an array twice; it can be donated once.
    state = jax.tree.map(jnp.copy, optimizer.init(params))
    self._carry, self._grads = (params, state), grads
    self._step = jax.jit(optimizer.step, donate_argnums=(0, 1))

  def prepare(self) -> None:
    pass

  def step(self) -> None:
    self._carry = self._step(*self._carry, self._grads)
    jax.block_until_ready(self._carry)

  def num_bytes(self) -> float:
    arrays = jax.tree.leaves((self._carry, self._grads))
    # A 4-bit integer says that it is of one byte.
    return sum(x.size * _bits(x.dtype) / 8 for x in arrays)


@dataclasses.dataclass(frozen=True)
class TorchOptimizer:
  """A torch optimizer class, and the dtype of parameters and gradients."""

  make: Callable[[list[Any]], Any]
  dtype: str

  def run(self, shapes: Shapes) -> Run:
    """Allocates on the kind of device that JAX uses."""
    return _TorchRun(self, shapes)


class _TorchRun:
  def __init__(self, optimizer: TorchOptimizer, shapes: Shapes):
    self._torch = torch = importlib.import_module('torch')
    torch.set_num_threads(os.cpu_count())
    device = {'cpu': 'cpu', 'gpu': 'cuda'}[jax.default_backend()]
    dtype = getattr(torch, optimizer.dtype)
    params, self._grads = (
      [torch.from_numpy(x).to(device, dtype) for x in numbers]
      for numbers in _numbers(shapes)
    )
    self._params = [torch.nn.Parameter(x) for x in params]
    self._optimizer = optimizer.make(self._params)
    self._wait = torch.cuda.synchronize if device == 'cuda' else lambda: None

  def prepare(self) -> None:
    # Some take the gradient away, some calculate in it.
    for param, grad in zip(self._params, self._grads, strict=True):
      param.grad = grad.clone()
    self._wait()

  def step(self) -> None:
    self._optimizer.step()
    self._wait()

  def num_bytes(self) -> float:
    state = list(self._optimizer.state.values())
    tensors = _tensors([self._params, state, self._grads], self._torch.Tensor)
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@dataclasses.dataclass(frozen=True)
class Peer:
  """A package by the name it is installed by, and its optimizer."""

  package: str
  load: Callable[[], JaxOptimizer | TorchOptimizer]

  @property
  def version(self) -> str | None:
    """None if it is not installed."""
    try:
      return importlib.metadata.version(self.package)
    except importlib.metadata.PackageNotFoundError:
      return None


def first_line(error: Exception) -> str:
  """What a table has room for."""
  name, lines = type(error).__name__, str(error).strip().splitlines()
  return f'{name}: {lines[0][:160]}' if lines else name


def _jax(module: str, name: str, **options: Any) -> JaxOptimizer:
  """An optimizer with `init` and `step`."""
  family = FAMILIES['adamw']
  make = getattr(importlib.import_module(module), name)
  made = make(family.learning_rate, **family.others, **options)
  return JaxOptimizer(made.init, made.step, jnp.bfloat16)


def _torch(
  module: str, name: str, dtype: str = 'bfloat16', **options: Any
) -> TorchOptimizer:
  """An optimizer with the signature of torch's own."""
  family = FAMILIES['adamw']
  make = functools.partial(
    getattr(importlib.import_module(module), name),
    lr=family.learning_rate,
    betas=(0.9, family.others['b2']),
    weight_decay=family.others['weight_decay'],
    **options,
  )
  return TorchOptimizer(make, dtype)


def _row(package: str, loader: Callable[..., Any], *args, **options) -> Peer:
  return Peer(package, functools.partial(loader, *args, **options))


PEERS = {
  'flashoptim-jax': _row(
    'flashoptim-jax', _jax, 'flashoptim_jax', 'flash_adamw', fused=False
  ),
  # Its default, a kernel for NVIDIA GPUs.
  'flashoptim-jax, fused': _row(
    'flashoptim-jax', _jax, 'flashoptim_jax', 'flash_adamw', fused=True
  ),
  'torch, fused, float32': _row(
    'torch', _torch, 'torch.optim', 'AdamW', 'float32', fused=True
  ),
  'torchao, 8 bit': _row('torchao', _torch, 'torchao.optim', 'AdamW8bit'),
  'torchao, 4 bit': _row('torchao', _torch, 'torchao.optim', 'AdamW4bit'),
  'bitsandbytes, 8 bit': _row(
    'bitsandbytes', _torch, 'bitsandbytes.optim', 'AdamW8bit'
  ),
  'optimi, Kahan': _row('torch-optimi', _torch, 'optimi', 'AdamW'),
  'flashoptim': _row('flashoptim', _torch, 'flashoptim', 'FlashAdamW'),
  'heavyball': _row('heavyball', _torch, 'heavyball', 'AdamW'),
}


def _numbers(shapes: Shapes) -> Iterator[list[np.ndarray]]:
  """Parameters, then gradients: the same for everyone."""
  rng = np.random.default_rng(0)
  for scale in (0.02, 1.0):
    yield [rng.normal(0, scale, shape).astype(np.float32) for shape in shapes]


def num_params(shapes: Shapes) -> int:
  """Of all leaves."""
  return sum(map(math.prod, shapes))


def _bits(dtype: Any) -> int:
  is_integer = jnp.issubdtype(dtype, jnp.integer)
  return (jnp.iinfo if is_integer else jnp.finfo)(dtype).bits


def _tensors(tree: Any, tensor: type) -> Iterator[Any]:
  """Tensors that own memory, in containers and in tensors made of tensors."""
  if isinstance(tree, Mapping):
    tree = list(tree.values())
  if isinstance(tree, list | tuple | set):
    for branch in tree:
      yield from _tensors(branch, tensor)
  elif hasattr(tree, '__tensor_flatten__'):
    names, _ = tree.__tensor_flatten__()
    yield from _tensors([getattr(tree, name) for name in names], tensor)
  elif isinstance(tree, tensor):
    yield tree
