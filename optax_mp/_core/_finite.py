# SPDX-License-Identifier: Apache-2.0
"""Checks whether a step makes a finite value infinite or NaN.

A state is checked in float32, before it is stored: integer codes cannot be NaN,
and a format may keep an infinity as its largest number. Therefore the wrapper
that stores a state makes a note of it while the step is traced, and the guard
of the step collects these notes.
"""

import abc
from collections.abc import Callable, Iterator
import contextlib
import contextvars
from typing import Any

import jax
import jax.numpy as jnp

from optax_mp._core import _traces


class Noted(abc.ABC):  # noqa: B024, a mark: NamedTuples have no base class
  """Marks the types of states that always make a note: one per state.

  Their method ``values`` returns the state with its stored arrays decoded. It
  is for steps whose notes do not arrive.
  """


class Notes:
  """The notes of one step in one trace: one flag per state."""

  def __init__(self):
    self.trace = _traces.current()
    self.flags: list[jax.Array] = []


_collecting: contextvars.ContextVar[tuple[Notes, ...]] = contextvars.ContextVar(
  'collecting', default=()
)


@contextlib.contextmanager
def collected() -> Iterator[Notes]:
  """Within this context, :func:`note` also adds to the notes that it yields."""
  notes = Notes()
  token = _collecting.set((*_collecting.get(), notes))
  try:
    yield notes
  finally:
    _collecting.reset(token)


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
  """Within this context nothing is noted: the step has been checked already."""
  token = _collecting.set(())
  try:
    yield
  finally:
    _collecting.reset(token)


def note(new: Any, old: Callable[[], Any]) -> None:
  """Notes for the guards of this step whether a new state stays finite.

  Args:
    new: the state in float32, before it is stored.
    old: a function that returns the state before the step, in float32.
  """
  here = _traces.current() if _collecting.get() else None
  # A flag must not leave its trace. If the state is made inside a branch or a
  # `vmap`, the guard around it checks the state as it is decoded instead.
  for notes in _collecting.get():
    if notes.trace == here:
      notes.flags.append(stays(new, old()))


def step_is_finite(
  update: Callable[[Any, Any, Any], tuple[Any, Any]],
  gradients: Any,
  state: Any,
  params: Any,
) -> jax.Array:
  """Whether gradients are finite, and finite values stay finite in a step.

  Args:
    update: ``update(gradients, state, params)`` of a transformation.
    gradients: the gradients of this step.
    state: the state before the step.
    params: the parameters before the step, or None.

  Returns:
    A flag. Parameters and states that were not finite before do not count.
  """
  with collected() as notes:
    updates, new = update(gradients, state, params)
  flags = [all_finite(gradients), *notes.flags]
  if params is None:
    flags.append(all_finite(updates))
  else:
    flags.append(stays(jax.tree.map(_sum, params, updates), params))
  nodes = jax.tree.leaves(new, is_leaf=_is_noted)
  before = jax.tree.structure(new, is_leaf=_is_noted).flatten_up_to(state)
  seen = len(notes.flags) >= sum(map(_is_noted, nodes))
  for x, y in zip(nodes, before, strict=True):
    if _is_noted(x):
      # Arrays of 16 bits may overflow after the note in float32; scales do not.
      x, y = (_halves(z) if seen else z.values() for z in (x, y))
    flags.append(stays(x, y))
  return every(flags)


def stays(new: Any, old: Any) -> jax.Array:
  """True unless a float was finite in ``old`` and is not in ``new``."""
  flags = [
    jnp.all(jnp.isfinite(_wide(x)) | ~jnp.isfinite(_wide(y)))
    for x, y in zip(*map(jax.tree.leaves, (new, old)), strict=True)
    if is_float(x) and is_float(y)
  ]
  return every(flags)


def all_finite(tree: Any) -> jax.Array:
  """True unless a float is infinite or NaN."""
  floats = filter(is_float, jax.tree.leaves(tree))
  return every([jnp.all(jnp.isfinite(_wide(x))) for x in floats])


def every(flags: list[jax.Array]) -> jax.Array:
  """True if all flags are true."""
  return jnp.all(jnp.stack(flags)) if flags else jnp.ones((), jnp.bool)


def is_float(x: Any) -> bool:
  """Whether ``x`` has real or complex values that can be infinite."""
  dtype = getattr(x, 'dtype', type(x))
  return jnp.issubdtype(dtype, jnp.inexact)


def _wide(x: Any) -> jax.Array:
  """``x``, in float32 if it has fewer bits: fp8 has no test of its own."""
  x = jnp.asarray(x)
  return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def _halves(tree: Any) -> list[Any]:
  return [
    x
    for x in jax.tree.leaves(tree)
    if is_float(x) and jnp.dtype(x.dtype).itemsize == 2
  ]


def _is_noted(x: Any) -> bool:
  return isinstance(x, Noted)


def _sum(param: Any, update: Any) -> Any:
  """The sum as ``optax.apply_updates`` computes it; only floats matter."""
  if not (is_float(param) and is_float(update)):
    return param
  with jax.numpy_dtype_promotion('standard'):
    return jnp.asarray(param + update).astype(jnp.asarray(param).dtype)
