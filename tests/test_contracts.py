# SPDX-License-Identifier: Apache-2.0
"""What wrappers, formats and recipes keep to around every optimizer."""

import functools
import inspect
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import checkpoint
from optax_mp import memory
import quick
import tables

BF16 = jnp.bfloat16
PAIRS = list(itertools.product(tables.OPTIMIZERS, tables.WRAPPERS))
STATES = list(itertools.product(tables.OPTIMIZERS, tables.STATES))
# A recipe has its optimizer in it.
TRACED = PAIRS + STATES + list(itertools.product(['its'], tables.RECIPES))
# Between them, all kinds of formats.
AROUND = [*tables.WRAPPERS, 'adamw_8bit', 'adamw_4bit_factored']
COMPENSATED = [*tables.WRAPPERS, *tables.RECIPES]
COMPENSATED.remove('compressed')
COMPRESSED = ('compressed', 'both')
RESIDUAL_BYTES = {'compensated-16': 2, 'compensated-8': 1, 'both': 2}

# kind: claim. Optax asks this of its own optimizers after as many steps.
CLAIM = {'rtol': 3e-2, 'atol': 3e-2}
STEPS = 30_000

START = {
  'parabola': np.array([-1.0, 10.0, 1.0]),
  'rosenbrock': np.array([0.0, 0.0]),
  'matrix': np.zeros((2, 2)),
  'mixed': (np.zeros(3), np.zeros((2, 2))),
}
OPTIMUM = {
  'parabola': np.array([1.0, -1.0, 1.0]),
  'rosenbrock': np.array([1.0, 1.0]),
  'matrix': np.array([[3.0, -2.0], [1.0, 4.0]]),
  'mixed': (np.array([1.0, -1.0, 2.0]), np.array([[1.0, 0.0], [-1.0, 1.0]])),
}
# Optax's adadelta finds no learning rate for the valley: too small it creeps,
# too large it diverges, in float32 as well.
NO_VALLEY = ('adadelta',)
# Lion's steps have one length, so weights without residual never come to rest:
# in the valley the variance of x, s^2, adds 400 s^2 x^2 to the mean loss, which
# draws x below 1, by more than the claim allows for most seeds.
RESTLESS = ('lion', 'compensated-0')
WITHOUT_VALLEY = [name for name in OPTIMUM if name != 'rosenbrock']
SQUARES = ('adadelta', 'adafactor')
UNSIGNED = ('log', 'factored')
NO_SIGNS = ('adadelta', 'adafactor', 'adagrad')  # in their states
# All targets for the bare optimizer and for the whole stack; the others are
# parts of it, and get the hardest, or the one that has a bound of its own too.
HARDEST = ('rosenbrock',)
TARGETS = {
  'compressed': HARDEST,
  'compensated-16': HARDEST,
  'compensated-8': HARDEST,
  'compensated-0': ('rosenbrock', 'matrix'),
}


def make(optimizer, wrapper, **kwargs):
  """What the tables have: a wrapper, or a format, around an optimizer.

  Args:
    optimizer: in `tables.OPTIMIZERS`.
    wrapper: in `tables.WRAPPERS` or `tables.STATES`; or in `tables.RECIPES`,
      which are optimizers themselves.
    **kwargs: `lr`, if not the table's.

  Returns:
    A transformation that stores even the smallest array.
  """
  if wrapper in tables.RECIPES:
    row = tables.RECIPES[wrapper]
    lr = kwargs.get('lr', row.lr)
    return row.recipe(lr, min_size=0, **row.settings)
  inner = tables.OPTIMIZERS[optimizer](**kwargs)
  if wrapper in tables.STATES:
    return optax_mp.compressed(inner, tables.STATES[wrapper].rule, min_size=0)
  return tables.WRAPPERS[wrapper](inner)


def small_tree(*dtypes):
  """Three parameters, whose dtypes are those given, in turn."""
  rng = np.random.default_rng(0)
  shapes = {'kernel': (4, 3), 'bias': (3,), 'head': (3, 2)}
  return {
    name: jnp.asarray(rng.normal(size=shape), dtype)
    for (name, shape), dtype in zip(
      shapes.items(), itertools.cycle(dtypes), strict=False
    )
  }


def gradients_of(params, seed=1):
  """Gradients with the shapes and dtypes of the parameters."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params
  )


def assert_same_bits(*trees):
  """kind: exact. As integers: -0.0 is not 0.0, a NaN is itself."""

  def view(x):
    x = np.asarray(x)
    return x.view(f'u{x.itemsize}')

  chex.assert_trees_all_equal(*(jax.tree.map(view, tree) for tree in trees))


def avals(tree):
  """What decides whether jit traces anew: weak types count."""
  return jax.tree.map(lambda x: (x.shape, x.dtype.name, x.weak_type), tree)


def step_fn(tx, **extra):
  """One step: (params, state, gradients) -> (params, state)."""

  def step(params, state, gradients):
    updates, state = tx.update(gradients, state, params, **extra)
    return optax.apply_updates(params, updates), state

  return step


def once(fn):
  """Fails if ``fn`` is traced a second time."""
  chex.clear_trace_counter()
  return quick.jit(chex.assert_max_traces(fn, n=1))


# Shapes, dtypes and bytes: traced only, nothing is compiled.


@pytest.mark.parametrize(('optimizer', 'wrapper'), TRACED)
def test_shapes_and_dtypes_are_stable(optimizer, wrapper):
  """Through init, update, scan and cond, with an argument nobody knows."""
  tx = make(optimizer, wrapper)
  params = small_tree(BF16, jnp.float16, jnp.float32)
  seen = {}

  def step(params, state):
    updates, new_state = tx.update(params, state, params, unexpected=1)
    seen.update(updates=updates, before=state, after=new_state)
    seen.update({name: avals(tree) for name, tree in seen.items()})
    return optax.apply_updates(params, updates), new_state

  def body(carry, flip):
    carry = jax.lax.cond(flip, lambda: step(*carry), lambda: carry)
    return carry, None

  def train(params, state):
    return jax.lax.scan(body, (params, state), jnp.arange(3) % 2 == 0)[0]

  state = jax.eval_shape(tx.init, params)
  new_params, new_state = jax.eval_shape(train, params, state)
  chex.assert_trees_all_equal_shapes_and_dtypes(new_params, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
  assert seen['before'] == seen['after'] == avals(state)
  assert seen['updates'] == {
    name: (p.shape, update_dtype(wrapper, p), False)
    for name, p in params.items()
  }


def update_dtype(wrapper, param):
  """`compensated` says in float32 what a 16-bit number could not."""
  return 'float32' if wrapper in COMPENSATED else param.dtype.name


@pytest.mark.parametrize('wrapper', tables.WRAPPERS)
def test_inner_sees_float32_and_its_arguments(wrapper):
  """Gradients, state, parameters; and what only it knows by name."""
  params, seen = small_tree(BF16, jnp.float16, jnp.float32), []

  def update(updates, state, params, *, factor):
    seen.extend(jax.tree.leaves((updates, state, params)))
    return jax.tree.map(lambda u: u * factor, updates), updates

  inner = optax.GradientTransformationExtraArgs(optax.tree.zeros_like, update)
  tx = tables.WRAPPERS[wrapper](inner)
  state = jax.eval_shape(tx.init, params)
  jax.eval_shape(step_fn(tx, factor=2.0), params, state, params)
  assert len(seen) == 3 * len(params)
  assert {x.dtype for x in seen} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(('optimizer', 'wrapper'), PAIRS + STATES)
def test_bytes_are_as_documented(optimizer, wrapper):
  """The plan's bytes, counted here from the shapes of the inner state."""
  params = {
    'kernel': jax.ShapeDtypeStruct((4096, 8192), BF16),
    'layers': jax.ShapeDtypeStruct((48, 1024, 1024), BF16),
    'bias': jax.ShapeDtypeStruct((8192,), BF16),
  }
  plan = memory.plan(make(optimizer, wrapper), params)
  num_params = sum(p.size for p in params.values())
  # 2 for the parameter, 2 for its gradient.
  expected = num_params * (2 + RESIDUAL_BYTES.get(wrapper, 0) + 2)
  expected += 4 * (2 if wrapper == 'both' else 1)  # a count for each wrapper
  expected += inner_bits(tables.OPTIMIZERS[optimizer](), wrapper, params) / 8
  assert plan.num_params == num_params
  assert plan.total_bytes == math.ceil(expected)  # kind: exact
  # kind: derived, a few float64 roundings.
  np.testing.assert_allclose(
    plan.bytes_per_param * num_params, expected, rtol=2**-48
  )


def inner_bits(inner, wrapper, params):
  """24 bits for a number in Split(8), 32 for any other, or as a format says."""
  params = jax.tree.map(
    lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), params
  )
  total = 0
  for leaf in jax.tree.leaves(jax.eval_shape(inner.init, params)):
    assert leaf.dtype in (jnp.float32, jnp.int32)
    bits = 32 * leaf.size
    if leaf.dtype == jnp.float32 and wrapper in COMPRESSED:
      bits = 24 * leaf.size
    elif leaf.dtype == jnp.float32 and wrapper in tables.STATES:
      bits = tables.STATES[wrapper].bits(leaf.shape)
    total += bits
  return total


@pytest.mark.parametrize('recipe', tables.RECIPES)
def test_recipes_take_the_bytes_that_they_say(recipe):
  """Exact: and, beside arrays as large as the parameter, counts and keys."""
  row, params = tables.RECIPES[recipe], jax.ShapeDtypeStruct((1024, 1024), BF16)
  tx = row.recipe(row.lr)
  leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
  small = sum(4 * x.size for x in leaves if x.size <= 3)
  plan = memory.plan(tx, params)
  assert plan.total_bytes == params.size * row.bytes + small


@pytest.mark.parametrize('optimizer', tables.OPTIMIZERS)
def test_init_allocates_what_the_plan_says(optimizer):
  """And agrees with its own trace, on arrays that do exist."""
  tx, params = make(optimizer, 'both'), {'kernel': jnp.ones((4, 3), BF16)}
  state = tx.init(params)
  assert avals(state) == avals(jax.eval_shape(tx.init, params))
  nbytes = sum(x.nbytes for x in jax.tree.leaves((params, state)))
  assert nbytes == memory.plan(tx, params, gradients=None).total_bytes


@pytest.mark.parametrize('min_size', [12, 13])
def test_min_size_leaves_small_arrays_alone(min_size):
  """The recipes pass it on; the plan shows what stayed in float32."""
  params = {'kernel': jnp.ones((4, 3), BF16), 'bias': jnp.ones((13,), BF16)}
  state = optax_mp.adamw_bf16(1e-3, min_size=min_size).init(params)
  mu = optax.tree.get(state, 'mu')
  assert (
    (mu['kernel'].dtype == jnp.float32)
    if min_size > 12
    else (mu['kernel'].low.dtype == jnp.uint8)
  )
  assert mu['bias'].low.dtype == jnp.uint8


# Training. The targets are one tree, so that one program serves them all.


def targets_of(optimizer, wrapper=None):
  """The targets that a pair is trained on."""
  names = TARGETS.get(wrapper, tuple(OPTIMUM))
  if optimizer in NO_VALLEY or (optimizer, wrapper) == RESTLESS:
    names = [name for name in names if name != 'rosenbrock']
  return list(names or ['matrix'])


def optimum_of(targets):
  return {name: OPTIMUM[name] for name in targets}


def loss_fn(params):
  """The sum of the targets, in float32."""
  params = dict(optax.tree.cast(params, jnp.float32))
  loss = 0.0
  if 'rosenbrock' in params:
    x, y = params.pop('rosenbrock')
    loss = (1.0 - x) ** 2 + 100.0 * (y - x**2) ** 2
  away = jax.tree.map(lambda p, q: p - q, params, optimum_of(params))
  return loss + optax.tree.norm(away, squared=True)


def minimize(tx, dtype, targets):
  """Trains -> (parameters, float32 parameters, their moving average)."""
  step = step_fn(tx)

  def body(carry, _):
    params, state, mean = carry
    params, state = step(params, state, jax.grad(loss_fn)(params))
    exact = checkpoint.to_float32(params, state)
    # Of the last tenth or so: it knows e^-10 of the start.
    mean = jax.tree.map(lambda m, p: m + (p - m) * (10 / STEPS), mean, exact)
    return (params, state, mean), None

  def train(params):
    mean = optax.tree.cast(params, jnp.float32)
    carry = (params, tx.init(params), mean)
    params, state, mean = jax.lax.scan(body, carry, length=STEPS)[0]
    return params, checkpoint.to_float32(params, state), mean

  start = {name: START[name] for name in targets}
  start = jax.tree.map(lambda x: jnp.asarray(x, dtype), start)
  return quick.jit(train)(start)


@pytest.mark.parametrize('optimizer', tables.OPTIMIZERS)
def test_optax_converges(optimizer):
  """Else the row of the table is wrong, and the next test says nothing."""
  targets = targets_of(optimizer)
  params, *_ = minimize(tables.OPTIMIZERS[optimizer](), jnp.float32, targets)
  chex.assert_trees_all_close(params, optimum_of(targets), **CLAIM)


@pytest.mark.parametrize(('optimizer', 'wrapper'), PAIRS)
def test_converges(optimizer, wrapper):
  """The weights that parameters and residuals stand for do. kind: claim."""
  targets = targets_of(optimizer, wrapper)
  dtype = BF16 if wrapper in COMPENSATED else jnp.float32
  params, exact, mean = minimize(make(optimizer, wrapper), dtype, targets)
  assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
  if wrapper == 'compensated-0':
    # A parameter without residual walks at random around the weight that it
    # stands for, which is the mean of the walk.
    exact = mean
    assert_near_optimum(params['matrix'], OPTIMUM['matrix'])
  chex.assert_trees_all_close(exact, optimum_of(targets), **CLAIM)


@pytest.mark.parametrize('optimizer', tables.OPTIMIZERS)
def test_converges_with_a_state_in_8_bits(optimizer):
  """With its state in one format, whatever it is. kind: claim.

  Divided by roots of averages that a signed format may round to zero, and by
  nothing else, two do not: all they keep are squares.
  """
  wrapper = 'log' if optimizer in SQUARES else 'int8'
  params, *_ = minimize(make(optimizer, wrapper), jnp.float32, WITHOUT_VALLEY)
  chex.assert_trees_all_close(params, optimum_of(WITHOUT_VALLEY), **CLAIM)


@pytest.mark.parametrize(
  ('optimizer', 'wrapper'),
  [pair for pair in STATES if pair[0] in NO_SIGNS or pair[1] not in UNSIGNED],
)
def test_every_state_takes_steps(optimizer, wrapper):
  """Squares in a signed format, too; what has signs needs one."""
  start = {'kernel': small_tree(jnp.float32)['kernel']}
  params, state = train(make(optimizer, wrapper), start, steps=3)
  chex.assert_tree_all_finite(params)
  assert np.all(params['kernel'] != start['kernel'])


@pytest.mark.parametrize(
  'wrapper', [name for name in tables.STATES if name not in UNSIGNED]
)
def test_converges_with_momentum_in_every_format(wrapper):
  """kind: claim. Second moments alone are for the other formats."""
  tx = make('sgd-momentum', wrapper)
  params, *_ = minimize(tx, jnp.float32, WITHOUT_VALLEY)
  chex.assert_trees_all_close(params, optimum_of(WITHOUT_VALLEY), **CLAIM)


@pytest.mark.parametrize(
  'recipe', [name for name in tables.RECIPES if not name.endswith('_bf16')]
)
def test_recipes_converge(recipe):
  """On all targets, the valley among them. kind: claim.

  Those in bfloat16 are `both`.
  """
  targets = list(OPTIMUM)
  params, exact, _ = minimize(make('its', recipe), BF16, targets)
  assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(BF16)}
  chex.assert_trees_all_close(exact, optimum_of(targets), **CLAIM)


def assert_near_optimum(param, optimum):
  """A stochastically rounded parameter does not walk far. kind: statistical.

  A step of d moves it by one unit in the last place, u, as often as d / u: a
  variance of d u a step against a pull of d, so the distance has a two-sided
  exponential law of scale u / 2, and passes 8 u once in e^16. Not in the
  valley, where there is hardly a pull.
  """
  unit = float(jnp.finfo(BF16).eps) * np.maximum(np.abs(optimum), 1.0)
  assert (np.abs(np.asarray(param, np.float32) - optimum) <= 8 * unit).all()


@pytest.mark.parametrize('wrapper', ['compressed', 'compensated-16', 'both'])
@pytest.mark.parametrize(
  'optimizer', [name for name in tables.OPTIMIZERS if name != 'sm3']
)
def test_schedule_equals_float_and_compiles_once(optimizer, wrapper):
  """All but Optax's sm3, which takes no schedule."""
  row = tables.OPTIMIZERS[optimizer]
  rate = inspect.signature(row).parameters['lr'].default
  dtype = jnp.float32 if wrapper == 'compressed' else BF16
  params = {'kernel': small_tree(dtype)['kernel']}
  ends = []
  for lr in (rate, optax.constant_schedule(rate)):
    tx = make(optimizer, wrapper, lr=lr)
    step = once(step_fn(tx, unexpected=1))
    carry = params, quick.jit(tx.init)(params)
    for seed in range(10):
      carry = step(*carry, gradients_of(params, seed))
    ends.append(checkpoint.to_float32(*carry)['kernel'])
  travelled = float(jnp.abs(ends[0] - params['kernel']).max())
  # kind: derived. Two programs fuse differently; where that moves a moment by
  # one bit of Split(8), the step changes by 2^-15 of itself.
  chex.assert_trees_all_close(*ends, rtol=2**-15, atol=travelled * 2**-13)


@pytest.mark.parametrize('wrapper', AROUND)
def test_compiles_once_under_a_schedule(wrapper):
  tx = make('adamw', wrapper, lr=optax.linear_schedule(1e-2, 1e-3, 10))
  step = once(step_fn(tx, unexpected=1))
  params = small_tree(BF16, jnp.float32)
  carry = params, tx.init(params)
  for seed in range(10):
    carry = step(*carry, gradients_of(params, seed))
  chex.assert_trees_all_equal_shapes_and_dtypes(carry[0], params)
  chex.assert_tree_all_finite(carry[0])


# Not for `both`, which rounds the momentum.
@pytest.mark.parametrize('wrapper', ['compensated-16', 'compensated-0'])
def test_float32_parameters_pass_through(wrapper):
  """Beside 16-bit ones: the inner updates, bit for bit. kind: exact."""
  tx, inner = make('sgd-momentum', wrapper), tables.OPTIMIZERS['sgd-momentum']()
  params = small_tree(BF16, jnp.float32)
  plain = {'bias': params['bias']}
  state, inner_state = tx.init(params), inner.init(plain)
  for seed in range(2):
    gradients = gradients_of(params, seed)
    updates, state = tx.update(gradients, state, params)
    expected, inner_state = inner.update(
      {'bias': gradients['bias']}, inner_state, plain
    )
    assert_same_bits(updates['bias'], expected['bias'])


# The neighbours in Optax that go around a transformation or beside it.


@functools.cache
def few_steps(wrap, wrapper):
  """Four steps of `wrap(wrapper(adamw))` -> (parameters, state)."""
  tx = wrap(make('adamw', wrapper))
  return train(tx, small_tree(BF16 if wrapper in COMPENSATED else jnp.float32))


def train(tx, params, steps=4):
  step = once(step_fn(tx))
  carry = params, tx.init(params)
  for seed in range(steps):
    carry = step(*carry, gradients_of(params, seed))
  return carry


def itself(tx):
  return tx


@pytest.mark.parametrize('wrapper', AROUND)
def test_chain(wrapper):
  """As the last of a chain. kind: exact, since the program is the same."""
  params, state = few_steps(
    lambda tx: optax.chain(optax.identity(), tx), wrapper
  )
  expected, expected_state = few_steps(itself, wrapper)
  assert_same_bits(params, expected)
  assert_same_bits(state[1], expected_state)


@pytest.mark.parametrize('wrapper', AROUND)
def test_masked(wrapper):
  """What is masked out keeps its gradient, the rest is as if alone."""
  inner = make('sgd-momentum', wrapper)
  tx = optax.masked(inner, {'in': True, 'out': False})
  params = {'in': jnp.ones((4, 3), BF16), 'out': jnp.ones((4,), BF16)}
  gradients, state = gradients_of(params), tx.init(params)
  updates, new_state = tx.update(gradients, state, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
  assert_same_bits(updates['out'], gradients['out'])
  assert_alone(inner, 'in', params, gradients, updates)


@pytest.mark.parametrize('wrapper', AROUND)
def test_partition(wrapper):
  """One group in 16 bits, the other plain float32, each as if alone."""
  params = {'kernel': jnp.ones((4, 3), BF16), 'norm': jnp.ones((3,))}
  wrapped, plain = make('sgd-momentum', wrapper), optax.sgd(0.1)
  tx = optax.partition(
    {'wrapped': wrapped, 'plain': plain}, {'kernel': 'wrapped', 'norm': 'plain'}
  )
  gradients, state = gradients_of(params), tx.init(params)
  updates, new_state = tx.update(gradients, state, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
  assert_alone(wrapped, 'kernel', params, gradients, updates)
  assert_alone(plain, 'norm', params, gradients, updates)


def assert_alone(tx, name, params, gradients, updates):
  """That a leaf had the update it would have alone. kind: exact, not jitted."""
  params, gradients = {name: params[name]}, {name: gradients[name]}
  expected, _ = tx.update(gradients, tx.init(params), params)
  assert_same_bits(updates[name], expected[name])


@pytest.mark.parametrize(('optimizer', 'wrapper'), TRACED)
def test_multi_steps_keeps_shapes_and_dtypes(optimizer, wrapper):
  tx = optax.MultiSteps(make(optimizer, wrapper), every_k_schedule=4)
  params = small_tree(BF16, jnp.float32)
  state = jax.eval_shape(tx.init, params)
  carry = jax.eval_shape(step_fn(tx), params, state, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(carry, (params, state))


@pytest.mark.parametrize('wrapper', AROUND)
def test_multi_steps(wrapper):
  """Nothing moves before the fourth micro-step."""
  tx = optax.MultiSteps(make('adamw', wrapper), every_k_schedule=4)
  params = small_tree(BF16, jnp.float32)
  state = start = tx.init(params)
  step, new_params = once(step_fn(tx)), params
  for seed in range(3):
    new_params, state = step(new_params, state, gradients_of(params, seed))
    assert_same_bits(new_params, params)
    assert_same_bits(state.inner_opt_state, start.inner_opt_state)
  new_params, state = step(new_params, state, gradients_of(params, 3))
  chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
  chex.assert_trees_all_equal_shapes_and_dtypes(new_params, params)
  for name, param in params.items():
    assert (new_params[name] != param).any()


@pytest.mark.parametrize('wrapper', AROUND)
def test_map_params(wrapper):
  tx, params = make('adamw', wrapper), small_tree(BF16)
  state = tx.init(params)
  assert_same_bits(optax.tree.map_params(tx, lambda x: x, state), state)


@pytest.mark.parametrize('wrapper', AROUND)
def test_vmap_over_layers(wrapper):
  """A state for each layer of a stacked leaf, and a step of each."""
  tx, params = make('adamw', wrapper), {'kernel': jnp.ones((4, 3), BF16)}
  layers = jax.tree.map(lambda p: jnp.stack([p, 2 * p, 3 * p]), params)
  stacked = jax.vmap(tx.init)(layers)
  alone = tx.init(params)
  layer = jax.tree.map(lambda x: x[1], stacked)
  assert_same_bits(layer, alone)  # zeros and the same key
  updates, new = jax.eval_shape(jax.vmap(tx.update), layers, stacked, layers)
  chex.assert_trees_all_equal_shapes_and_dtypes(new, stacked)
  chex.assert_trees_all_equal_shapes(updates, layers)


# inject_hyperparams: in bfloat16 b2 = 0.999 is 1, so it goes inside, where all
# is float32, or is told to keep float32.


def inject_inside(wrapper):
  inner = optax.inject_hyperparams(tables.OPTIMIZERS['adamw'])(lr=1e-1)
  return tables.WRAPPERS[wrapper](inner)


def inject_outside(wrapper, optimizer='adamw'):
  return optax.inject_hyperparams(
    lambda lr: make(optimizer, wrapper, lr=lr), hyperparam_dtype=jnp.float32
  )(lr=1e-1)


@pytest.mark.parametrize('inject', [inject_inside, inject_outside])
@pytest.mark.parametrize('wrapper', tables.WRAPPERS)
def test_inject_hyperparams(wrapper, inject):
  """The rate in the state does what the rate in the table does."""
  exact = checkpoint.to_float32(*few_steps(lambda tx: inject(wrapper), wrapper))
  expected = checkpoint.to_float32(*few_steps(itself, wrapper))
  # kind: derived. min_size=0 keeps even the rate in Split(8), within 2^-16 of
  # itself: that is less than one rounding of the weight in each of 4 steps.
  unit = {'compensated-8': 2**-15, 'compensated-0': 2**-7}.get(wrapper, 2**-16)
  chex.assert_trees_all_close(exact, expected, rtol=0.0, atol=4 * 2 * unit)


@pytest.mark.parametrize(('optimizer', 'wrapper'), TRACED)
def test_inject_hyperparams_around_every_optimizer(optimizer, wrapper):
  """Traced: no wrapper asks for the value of a number."""
  tx = inject_outside(wrapper, optimizer)
  params = {'kernel': jnp.ones((4, 3), BF16)}
  state = jax.eval_shape(tx.init, params)
  carry = jax.eval_shape(step_fn(tx), params, state, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(carry, (params, state))


STATIC = ('residual_bits', 'keep_float32', 'min_size', 'seed')


def inject(recipe, static=STATIC):
  """With the arguments that decide on the layout named static."""
  known = inspect.signature(recipe).parameters
  return optax.inject_hyperparams(
    recipe,
    static_args=[name for name in static if name in known],
    hyperparam_dtype=jnp.float32,
  )


# A decay that is traced is rounded for as a large one; here it is one.
DECAY = {'sgdm_8bit': 'momentum', 'lion_8bit': 'b2', 'muon_8bit': 'beta'}


@pytest.mark.parametrize('name', tables.RECIPES)
def test_recipes_in_inject_hyperparams(name):
  """They do what the same numbers do that are no arrays."""
  recipe, params = tables.RECIPES[name].recipe, small_tree(BF16)
  del params['head']
  settings = {'learning_rate': 1e-1, 'min_size': 0}
  if not name.endswith('_bf16'):
    settings |= {DECAY.get(name, 'b1'): 0.95, 'keep_float32': 'bias'}
  exact = checkpoint.to_float32(*train(inject(recipe)(**settings), params))
  expected = checkpoint.to_float32(*train(recipe(**settings), params))
  # kind: derived. The two programs fuse differently. A bit of Split(8) in a
  # moment is 2^-15 of a step of 0.1. Codes lie so far apart that a rounding of
  # float32 moves one in 2^15: none of these.
  chex.assert_trees_all_close(exact, expected, rtol=0.0, atol=2**-14)


@pytest.mark.parametrize('recipe', [optax_mp.adamw_bf16, optax_mp.adamw_8bit])
@pytest.mark.parametrize('left_out', ['residual_bits', 'min_size', 'seed'])
def test_recipe_says_what_must_be_static(recipe, left_out):
  static = [name for name in STATIC if name != left_out]
  tx = inject(recipe, static)(
    learning_rate=1e-1, residual_bits=16, min_size=0, seed=0
  )
  with pytest.raises(ValueError, match=f'`{left_out}`.*`static_args`'):
    tx.init(small_tree(BF16))


# apply_if_finite in the four places where it can be.


def to_float32(updates, params=None):
  del params
  return optax.tree.cast(updates, jnp.float32)


GUARDED = {
  'around-compressed': lambda: optax.apply_if_finite(
    make('adamw', 'compressed'), 5
  ),
  'around-compensated': lambda: optax.apply_if_finite(
    make('adamw', 'compensated-8'), 5
  ),
  'inside-compensated': lambda: optax_mp.compensated(
    optax.apply_if_finite(tables.OPTIMIZERS['adamw'](), 5)
  ),
  'inside-both': lambda: optax_mp.compensated(
    optax.apply_if_finite(make('adamw', 'compressed'), 5), 0
  ),
  'after-a-cast': lambda: optax.chain(
    optax.stateless(to_float32), optax.apply_if_finite(make('adamw', 'both'), 5)
  ),
  'around-a-recipe': lambda: optax.chain(
    optax.stateless(to_float32),
    optax.apply_if_finite(make('its', 'adamw_8bit'), 5),
  ),
}


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf])
@pytest.mark.parametrize('place', GUARDED)
def test_apply_if_finite(place, bad):
  """A step that is not finite leaves no trace, and the next one works."""
  tx, params = GUARDED[place](), small_tree(BF16)
  step = guarded_step(place)
  dtype = jnp.float32 if place == 'around-compensated' else BF16
  good = optax.tree.cast(gradients_of(params), dtype)
  poisoned = {**good, 'kernel': good['kernel'].at[0, 0].set(bad)}
  params, state = step(params, tx.init(params), good)
  new_params, new_state = step(params, state, poisoned)
  assert_same_bits(new_params, params)
  assert_same_bits(guarded(new_state), guarded(state))
  if hasattr(new_state, 'residual'):
    assert_same_bits(new_state.residual, state.residual)
  last_params, last_state = step(new_params, new_state, good)
  chex.assert_tree_all_finite(last_params)
  for name, param in params.items():
    assert (last_params[name] != param).any()
  if place != 'inside-both':  # its noise is one step further on
    expected_params, expected_state = step(params, state, good)
    assert_same_bits(last_params, expected_params)
    assert_same_bits(guarded(last_state), guarded(expected_state))


@functools.cache
def guarded_step(place):
  return quick.jit(step_fn(GUARDED[place]()))


def guarded(state):
  """The state that `apply_if_finite` looks after."""

  def is_guard(x):
    return isinstance(x, optax.ApplyIfFiniteState)

  (found,) = filter(is_guard, jax.tree.leaves(state, is_leaf=is_guard))
  return found.inner_state
