# SPDX-License-Identifier: Apache-2.0
"""Parameters with named axes that not all of their state can be cut along."""

from collections.abc import Callable, Iterable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax

import optax_mp
import tables

AXES = ('b', 'd')  # of a mesh of 2 x 4 devices
SHAPES = {
  'kernel': ((64, 256), (None, 'd')),  # two blocks a row, for four devices
  'odd': ((64, 200), (None, 'd')),  # no whole block
  'rows': ((64, 200), ('d', None)),
  'stack': ((2, 64, 512), (None, 'b', 'd')),
  'vector': ((256,), ('d',)),
}


def make_mesh(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
  return jax.make_mesh((2, 4), AXES, axis_types=(kind,) * 2)


def values(seed: int, names: Iterable[str] = SHAPES) -> dict[str, np.ndarray]:
  """Parameters, or gradients, on the host."""
  rng = np.random.default_rng(seed)
  return {
    name: rng.normal(size=SHAPES[name][0]).astype(jnp.bfloat16)
    for name in names
  }


def assert_close(ours: Any, theirs: Any) -> None:
  """kind: derived. To one bfloat16 ulp: sums in another order."""
  chex.assert_trees_all_close(widened(ours), widened(theirs), rtol=2**-7)


def widened(tree: Any) -> Any:
  return jax.tree.map(lambda x: np.asarray(x).astype(np.float32), tree)


def recipe(name: str) -> Callable[[], Any]:
  row = tables.RECIPES[name]
  return lambda: row.recipe(row.lr, min_size=0, **row.settings)


def paper(name: str) -> Callable[[], Any]:
  row = tables.PAPERS[name]
  return lambda: optax_mp.compensated(row.make(learning_rate=row.lr), 8)


def in_format(name: str) -> Callable[[], Any]:
  def make():
    inner = optax_mp.compressed(
      optax.adam(1e-2), {'nu': tables.STATES[name].rule}, min_size=0
    )
    return optax_mp.compensated(inner, 8)

  return make


# Everything: recipes, papers' optimizers, formats of a state.
ALL = {name: recipe(name) for name in tables.RECIPES}
ALL |= {
  name: paper(name) for name, row in tables.PAPERS.items() if not row.variant
}
ALL |= {f'nu in {name}': in_format(name) for name in tables.STATES}
# What is run, which takes longer: states with all kinds of shapes.
SOME = ('adamw_8bit', 'adamw_4bit_factored', 'came')
FEW = ('kernel', 'rows', 'vector')
