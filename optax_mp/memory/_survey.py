# SPDX-License-Identifier: Apache-2.0
"""Compiles a training step of a GPT, on one device or cut over several."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import optax

from optax_mp import formats
from optax_mp.formats import _paths
from optax_mp.memory import _compile
from optax_mp.memory import _plan
from optax_mp.memory import _report
from optax_mp.memory import gpt

P = jax.sharding.PartitionSpec


@dataclasses.dataclass(frozen=True)
class Recipe:
  """An optimizer and the dtype of the parameters it is for."""

  name: str
  tx: optax.GradientTransformation
  dtype: Any
  # `in_backward(axis)` for `gpt.in_backward`, if that is where `tx` is applied.
  in_backward: Callable[[str | None], Any] | None = None

  def step(self, axis: str | None = None) -> tuple[Any, Callable[..., Any]]:
    """Makes a state, and a training step."""
    if self.in_backward:
      return gpt.in_backward(self.in_backward(axis))
    return self.tx.init, gpt.make_step(self.tx, axis)

  def bytes_per_param(self, size: gpt.Size) -> float:
    """Of parameters, state and the gradients that exist at once."""
    params = gpt.shapes(size, self.dtype)
    if not self.in_backward:
      return _plan.plan(self.tx, params).bytes_per_param
    whole = optax.GradientTransformation(self.step()[0], self.tx.update)
    kept = _plan.plan(whole, params, gradients=None)
    gradients = jax.tree.leaves(gpt.halves(params)[0])
    bytes = sum(x.size * x.dtype.itemsize for x in gradients)
    return kept.bytes_per_param + bytes / kept.num_params


def compile_step(
  recipe: Recipe, size: gpt.Size, target: str, num_devices: int = 1
) -> _report.Report:
  """Compiles a training step, on several devices with everything sharded.

  On several devices each matrix, its state and its gradient are cut along the
  matrix's rows (FSDP, ZeRO 3) and the batch along its first axis; vectors are
  on every device.

  Args:
    recipe: the optimizer.
    size: of the model.
    target: as for :func:`compile_for`.
    num_devices: of one slice or node.

  Returns:
    The report, per device.
  """
  params = gpt.shapes(size, recipe.dtype)
  init, step = recipe.step('data' if num_devices > 1 else None)
  state = jax.eval_shape(init, params)
  tokens = gpt.tokens(size, num_devices)
  if num_devices == 1:
    compiled = _compile.compile_for(
      target, step, params, state, tokens, donate_argnums=(0, 1)
    )
    return _report.report(compiled)
  mesh = jax.sharding.AbstractMesh(
    (num_devices,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  specs = (*_specs(params, state, num_devices), P('data'))
  shardings = jax.tree.map(lambda s: jax.sharding.NamedSharding(mesh, s), specs)
  args = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    (params, state, tokens),
    shardings,
  )
  # What comes out is where it came in: only so can its memory be reused.
  jitted = jax.jit(
    step,
    donate_argnums=(0, 1),
    out_shardings=(*shardings[:2], None),
  )
  return _report.report(_compile.compile_for(target, jitted, *args, mesh=mesh))


def _specs(params: Any, state: Any, num_devices: int) -> tuple[Any, Any]:
  """Cuts matrices by rows, their codes alike, their scales as their rows."""

  def of_param(path, leaf):
    # A stack of vectors has two axes, but no rows.
    stacked = getattr(path[0], 'key', None) == 'layers'
    rows = leaf.ndim - 2
    if leaf.ndim - stacked < 2 or leaf.shape[rows] % num_devices:
      return P()
    return P(*[None] * rows, 'data', None)

  specs = jax.tree_util.tree_map_with_path(of_param, params)
  by_path = {
    path: spec
    for path, spec in jax.tree_util.tree_leaves_with_path(
      specs, is_leaf=lambda x: isinstance(x, P)
    )
  }
  # A state of layers alone has paths that begin there.
  by_path |= {path[1:]: spec for path, spec in by_path.items() if path[1:]}
  leaves, treedef = jax.tree_util.tree_flatten_with_path(
    state, is_leaf=formats.is_stored
  )
  parts = _paths.split_paths([path for path, _ in leaves], by_path)

  def of_array(array, spec):
    rows = len(spec) - 2
    fits = array.ndim > rows >= 0 and array.shape[rows] % num_devices == 0
    return P(*tuple(spec)[: array.ndim]) if fits else P()

  def of_state(path, leaf):  # an array, or the codes and scales of a format
    spec = by_path.get(parts[path][1], P())
    return jax.tree.map(lambda array: of_array(array, spec), leaf)

  return specs, treedef.unflatten([of_state(p, x) for p, x in leaves])
