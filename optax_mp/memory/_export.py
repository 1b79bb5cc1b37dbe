# SPDX-License-Identifier: Apache-2.0
"""Turns a caller's step into a program that can travel to another process."""

import dataclasses
import re
from typing import Any

import jax
from jax import export

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

_CUSTOM_CALL = re.compile(r'custom_call @([\w.$]+)\(')
_JITTED = type(jax.jit(lambda: None))


def jitted(fn, donate_argnums, static_argnums) -> Any:
  """Jits, unless the caller did."""
  if isinstance(fn, jax.stages.Wrapped) and not isinstance(fn, _JITTED):
    raise ValueError(
      f'`fn` must be a function or `jax.jit` of one; got {fn!r}. Where it is '
      '`nnx.jit`, `nnx.split` the modules: `jax.jit` a step of their states.'
    )
  if not isinstance(fn, _JITTED):
    return jax.jit(
      fn, donate_argnums=donate_argnums, static_argnums=static_argnums
    )
  for name, given in (
    ('donate_argnums', donate_argnums),
    ('static_argnums', static_argnums),
  ):
    if given != ():
      raise ValueError(
        f'`{name}` is for a function that is not jitted; got {given} and a '
        f'jitted one. Give it to `jax.jit`.'
      )
  return fn


def shape(leaf: Any) -> Any:
  """An array's shape; its sharding if it is of a mesh, not of this machine."""
  if not (hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')):
    return leaf
  sharding = getattr(leaf, 'sharding', None)
  kind = getattr(sharding, 'memory_kind', None)
  if kind == 'pinned_host':
    raise ValueError(
      f'`args` must be in device memory; got an array of shape {leaf.shape} in '
      f'memory {kind!r}, which is not compiled for yet. Leave the kind out to '
      'count it with the others.'
    )
  if isinstance(sharding, jax.sharding.NamedSharding):
    sharding = jax.sharding.NamedSharding(
      abstract(sharding.mesh), sharding.spec
    )
  else:
    sharding = None
  weak = getattr(leaf, 'weak_type', False)
  return jax.ShapeDtypeStruct(
    leaf.shape, leaf.dtype, sharding=sharding, weak_type=weak
  )


def abstract(mesh: Mesh) -> jax.sharding.AbstractMesh:
  """The mesh, of devices of no kind."""
  return jax.sharding.AbstractMesh(
    mesh.axis_sizes, mesh.axis_names, axis_types=mesh.axis_types
  )


def lower(fn, args, platform: str) -> export.Exported:
  """Lowers for a platform, to a form that can travel."""
  allowed: set[str] = set()
  while True:
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in allowed]
    exporter = export.export(fn, platforms=[platform], disabled_checks=checks)
    try:
      exported = exporter(*args)
      break
    except ValueError as error:
      # `jax.export` guards programs that are kept for long against custom calls
      # that may change. Ours is compiled at once, by the same JAX.
      refused = set(_CUSTOM_CALL.findall(str(error))) - allowed
      if 'specified backend' in str(error):
        raise _calls_back(error) from error
      if not refused:
        raise
      allowed |= refused
    except NotImplementedError as error:
      raise _calls_back(error) from error
  # Containers of the caller's own types cannot be written; arrays can.
  inputs = ((0,) * len(exported.in_avals), {})
  return dataclasses.replace(
    exported,
    in_tree=jax.tree.structure(inputs),
    out_tree=jax.tree.structure((0,) * len(exported.out_avals)),
  )


def _calls_back(error: Exception) -> ValueError:
  return ValueError(
    '`fn` must not call the host to be compiled for another device; got '
    f'{str(error)[:200]}. Remove `jax.debug.print`, `io_callback`, ....'
  )


def serialize(exported: export.Exported) -> bytearray:
  """Writes a program for another process."""
  try:
    return exported.serialize()
  except KeyError as error:
    raise ValueError(
      f'`fn` has arrays of dtype {error.args[0]}, which `jax.export` cannot '
      'write; got them as arguments or results. Convert them inside of `fn`.'
    ) from error


def paths(traced: jax.stages.Traced) -> list[str]:
  """What the arguments are called: "params['w']"."""
  leaves = jax.tree_util.tree_leaves_with_path(traced.args_info)
  paths = [jax.tree_util.keystr(path) for path, _ in leaves]
  info = getattr(getattr(traced.jaxpr, 'jaxpr', None), 'debug_info', None)
  names = getattr(info, 'arg_names', None)
  return list(names) if names and len(names) == len(paths) else paths
