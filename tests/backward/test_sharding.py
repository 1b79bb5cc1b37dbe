# SPDX-License-Identifier: Apache-2.0
"""On eight devices: the same numbers, and gradients are reduced in the loop."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import backward
import quick

LAYERS, WIDTH, WIDE, BATCH = 3, 16, 32, 16
BF16 = jnp.bfloat16

# How the layers' leaves lie: whole on every device, or cut along an axis.
SPECS = {
  'data parallel': (P(), P()),
  'rows': (P(None, 'd', None), P(None, 'd')),
  'columns': (P(None, None, 'd'), P()),
}
TXS = {
  'adamw': (lambda: optax.adamw(1e-2, weight_decay=0.1), jnp.float32),
  'noise': (
    lambda: optax_mp.compensated(optax.adamw(1e-2, weight_decay=0.1), 0),
    BF16,
  ),
}


def host(dtype):
  """Rest, stack and batch."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return (0.3 * rng.normal(size=shape)).astype(dtype)

  rest = {'in': normal(4, WIDTH), 'out': normal(WIDTH, 1)}
  stack = {
    'up': normal(LAYERS, WIDTH, WIDE),
    'down': normal(LAYERS, WIDE, WIDTH),
    'bias': normal(LAYERS, WIDE),
  }
  return rest, stack, rng.normal(size=(BATCH, 4)).astype(np.float32)


def gathered(p, mesh):
  """FSDP: a layer's weights whole, when they are needed, and no earlier."""
  whole = NamedSharding(mesh, P())
  return jax.tree.map(lambda x: constrain(x, whole), p)


def constrain(x, sharding):
  if AxisType.Explicit in sharding.mesh.axis_types:
    return jax.sharding.reshard(x, sharding)
  return jax.lax.with_sharding_constraint(x, sharding)


def block_fn(p, h, mesh=None):
  p = p if mesh is None else gathered(p, mesh)
  p = jax.tree.map(lambda x: x.astype(h.dtype), p)
  return h + jnp.tanh(h @ p['up'] + p['bias']) @ p['down']


def loss_fn(rest, blocks, x):
  rest = jax.tree.map(lambda w: w.astype(x.dtype), rest)
  return jnp.mean((blocks(x @ rest['in']) @ rest['out'] - 1) ** 2)


def make(name, mesh=None):
  tx, _ = TXS[name]
  block = functools.partial(block_fn, mesh=mesh)
  return backward.fused_step(loss_fn, block, tx(), max_norm=0.5)


@functools.cache
def on_one_device(name):
  step = make(name)
  rest, stack, x = jax.tree.map(jnp.asarray, host(TXS[name][1]))
  state, step_fn = step.init(rest, stack), quick.jit(step)
  for _ in range(3):
    rest, stack, state, loss = step_fn(rest, stack, state, x)
  return rest, stack, loss


def placed(name, spec, mesh):
  """Arguments of the step, on the devices."""
  rest, stack, x = host(TXS[name][1])
  matrix, bias = SPECS[spec]
  specs = {'up': matrix, 'down': matrix, 'bias': bias}
  put = {k: jax.device_put(w, NamedSharding(mesh, specs[k]))
         for k, w in stack.items()}  # fmt: skip
  rest = jax.device_put(rest, NamedSharding(mesh, P()))
  x = jax.device_put(x, NamedSharding(mesh, P('d')))
  return rest, put, x


def lies_like(tree, like):
  same = jax.tree.map(
    lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), tree, like
  )
  return all(jax.tree.leaves(same))


@pytest.mark.parametrize(
  'name, spec', [*(('adamw', spec) for spec in SPECS), ('noise', 'rows')]
)
def test_equals_one_device_and_stays(name, spec, mesh):
  """kind: derived: sums of 8 parts; of noise, one rounding in fifty."""
  rest, stack, x = placed(name, spec, mesh)
  step = make(name, mesh)
  state = step.init(rest, stack)
  mu = optax.tree.get(state.stack, 'mu')
  assert lies_like(mu, stack)
  step_fn = quick.jit(step).lower(rest, stack, state, x).compile()
  new = rest, stack, state
  for _ in range(3):  # it would not take arguments that lie elsewhere
    *new, loss = step_fn(*new, x)
  assert lies_like(new[1], stack)
  assert lies_like(optax.tree.get(new[2].stack, 'mu'), stack)
  *expected, expected_loss = on_one_device(name)
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  found, wanted = (
    [np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(tree)]
    for tree in (tuple(new[:2]), tuple(expected))
  )
  close = np.isclose(np.concatenate(found), np.concatenate(wanted), 1e-4, 1e-6)
  assert close.mean() >= (0.98 if name == 'noise' else 1)


def computations(text):
  """The bodies of an HLO module by name."""
  found = re.findall(r'^%?([\w.-]+) \(.*?\{\n(.*?)^\}', text, re.M | re.S)
  return dict(found)


@pytest.mark.parametrize('spec', ['data parallel', 'rows'])
def test_gradients_are_reduced_inside_the_loop(spec):
  """In the HLO: in a loop's body, and of one layer; none of all layers."""
  mesh = jax.make_mesh((8,), ('d',), axis_types=(AxisType.Auto,))
  rest, stack, x = placed('adamw', spec, mesh)
  block = functools.partial(block_fn, mesh=mesh)
  step = backward.fused_step(loss_fn, block, optax.adamw(1e-2))
  state = step.init(rest, stack)
  compiled = quick.jit(step, donate_argnums=(0, 1, 2)).lower(
    rest, stack, state, x
  )
  text = compiled.compile().as_text()
  bodies = set(re.findall(r'body=%?([\w.-]+)', text))
  reduced = [
    (name in bodies, re.findall(r'f32\[([\d,]*)\]', line.split(' all-')[0]))
    for name, body in computations(text).items()
    for line in body.splitlines()
    if re.search(r' (all-reduce|reduce-scatter|all-to-all)(-start)?\(', line)
  ]
  in_loop = {shape for inside, shapes in reduced if inside for shape in shapes}
  outside = {
    shape for inside, shapes in reduced if not inside for shape in shapes
  }
  sizes = {shape: np.prod([int(n) for n in shape.split(',') if n])
           for shape in in_loop | outside}  # fmt: skip
  largest = WIDTH * WIDE
  assert any(sizes[shape] == largest for shape in in_loop), reduced
  assert all(sizes[shape] <= largest for shape in in_loop), reduced
  # Outside the loop, only what `rest` has.
  assert all(sizes[shape] <= 4 * WIDTH for shape in outside), reduced
