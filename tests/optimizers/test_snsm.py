# SPDX-License-Identifier: Apache-2.0
"""Subset-Norm and Subspace-Momentum: the authors' code, a slow reference."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mp
from optax_mp import memory
from optax_mp import optimizers
import quick
import recorded
from reference import snsm as reference

FILE = 'subset_norm_subspace_momentum'
# kind: derived. README of the vectors: another float32 program was a fifth of
# that away.
SVD = 1e-6
COORDINATES = 2e-5  # of an SVD with a second moment for each
LARGE_STEPS = 1e-5  # of a learning rate of 1
BASES = 1e-5  # of projectors, up to signs


def recorded_indices(case):
  """What the official code drew, by the shape of the gradient."""
  leaves = case['steps'][0]['state']
  shapes = {p: np.shape(x) for p, x in case['params0'].items()}
  indices = {
    shapes[name]: state['projector']['opt_idxs']
    for name, state in leaves.items()
    if 'projector' in state
  }
  return lambda g, rank, key: jnp.asarray(indices[g.shape], jnp.int32)


def adamw_with(case, **others):
  hyper = case['hyper']
  b1, b2 = hyper['betas']
  make = optimizers.adamw_snsm if 'rank' in hyper else optimizers.adamw_sn
  if 'rank' in hyper:
    others.setdefault('projector', hyper['proj_type'])
    others |= {'rank': hyper['rank'], 'gap': hyper['update_proj_gap']}
  return make(hyper['lr'], b1, b2, eps=hyper['eps'], **others)


def rmsprop(case):
  """The authors' class corrects bias, their preset does not."""
  hyper = case['hyper']
  scale = optimizers.scale_by_subset_norm(hyper['betas'][1], hyper['eps'])
  return optax.chain(scale, optax.scale_by_learning_rate(hyper['lr']))


def like(case):
  name = case['name']
  if name == 'rmsprop_sn_heuristic':
    return rmsprop(case)
  if name == 'generic_adagrad_sn':
    hyper = case['hyper']
    return optimizers.adagrad_sn(hyper['lr'], hyper['betas'][0], hyper['eps'])
  if name.startswith('adamw_sng'):
    size = case['hyper']['subset_size']
    return adamw_with(case, subset_size=size, matrices=None)
  if 'uniform' in name:
    return adamw_with(case, projector=recorded_indices(case))
  return adamw_with(case)


@pytest.mark.parametrize('name', recorded.cases(FILE))
def test_follows_the_official_code(name):
  case = recorded.cases(FILE)[name]
  # At the third step the official code uses its old momentum once more.
  steps = 2 if 'refresh3' in name else None
  atol = {'generic_adagrad_sn': LARGE_STEPS}.get(name, recorded.PARAMS)
  atol = SVD if 'svd' in name else atol
  states = recorded.assert_follows(like(case), case, atol, steps)
  for state, step in zip(states, case['steps'], strict=False):
    assert_states(state, step['state'])


def assert_states(state, wanted):
  trees = {'exp_avg': 'mu', 'exp_avg_sq': 'nu'}
  ours = jax.tree_util.tree_leaves_with_path(state)
  for leaf, fields in wanted.items():
    of_leaf = {
      key.name: x
      for path, x in ours
      if getattr(path[-1], 'key', None) == leaf
      for key in path
      if isinstance(key, jax.tree_util.GetAttrKey)
    }
    for theirs, name in trees.items():
      if theirs in fields:
        value = np.asarray(fields[theirs])
        got = np.asarray(of_leaf[name])
        if 'ortho_matrix' in fields.get('projector', {}) and name == 'mu':
          basis = np.asarray(fields['projector']['ortho_matrix'])
          got = got * signs(of_leaf['projector'], basis, got.shape)
        recorded.assert_state(got, value)
    indices = fields.get('projector', {})
    for key in ('top_indices', 'opt_idxs'):
      if key in indices:
        assert sorted(of_leaf['projector'].tolist()) == sorted(indices[key])


def signs(ours, theirs, shape):
  """Singular vectors have none of their own."""
  axis = -1 if shape[0] > shape[1] else 0
  sign = np.sign((np.asarray(ours) * theirs).sum(axis, keepdims=True))
  np.testing.assert_allclose(ours * sign, theirs, rtol=0.0, atol=BASES)
  return sign.T


def test_the_momentum_starts_anew_in_a_new_subspace():
  name = 'snsm_intended_reset_reference'
  (case,) = recorded.cases(name).values()
  ours = recorded.run(
    adamw_with(case), recorded.parameters(case), recorded.gradients(case)
  )
  wanted = [
    {leaf: np.asarray(x) for leaf, x in params.items()}
    for params in case['params_after']
  ]
  assert len(wanted) == 6
  for (params, _), after in zip(ours, wanted, strict=True):
    chex.assert_trees_all_close(params, after, rtol=0.0, atol=1e-6)


SHAPES = [(12, 5), (5, 12), (6, 6), (7,), (2,), (), (1, 3), (11, 13)]
MATRICES = [(12, 5), (5, 12), (6, 6)]


@pytest.mark.parametrize('size', ['heuristic', None, -2, -1, 4, 1000])
def test_subset_norm_follows_the_reference(size):
  """Primes, three coordinates or fewer, and subsets larger than a leaf too."""
  tx = optimizers.adamw_sn(
    1e-2, 0.8, 0.95, weight_decay=0.1, subset_size=size, matrices=None
  )
  slow = functools.partial(
    reference.SnSm, subset_size=size, b1=0.8, b2=0.95, decay=0.1
  )
  assert_follows_reference(tx, slow, SHAPES)


def assert_follows_reference(tx, slow, shapes, steps=4, atol=recorded.PARAMS):
  """kind: derived. A leaf a shape, named like that."""
  rng = np.random.default_rng(0)

  def draw(shape):
    scales = 10.0 ** rng.uniform(-1, 1, shape[:1] + (1,) * (len(shape) - 1))
    return (scales * rng.normal(size=shape)).astype(np.float32)

  start, *grads = (
    {str(shape): draw(shape) for shape in shapes} for _ in range(steps + 1)
  )
  start = jax.tree.map(np.tanh, start)  # weights of less than 1
  slow = {str(shape): slow(shape) for shape in shapes}
  wanted = {name: np.float64(w) for name, w in start.items()}
  ours = recorded.run(tx, jax.tree.map(jnp.asarray, start), grads)
  for (params, _), g in zip(ours, grads, strict=True):
    for name, w in wanted.items():
      wanted[name] = slow[name].step(w, np.float64(g[name]))
    chex.assert_trees_all_close(params, wanted, rtol=0.0, atol=atol)


FLAVOURS = {
  'adamw_snsm': ({}, 0.9, 0.999, True),
  'adamw_sm': ({'subset_size': None}, 0.9, 0.999, True),
  'adagrad_snsm': ({}, 0.9, 1, False),
  'sgd_sm': ({'denominator': False}, 0.9, 0, False),
  'adagrad_sn': ({}, 0.9, 1, False),
  'rmsprop_sn': ({}, 0.0, 0.999, False),
}


@pytest.mark.parametrize('projector', ['svd', 'topk'])
@pytest.mark.parametrize('name', FLAVOURS)
def test_flavours_follow_the_reference(name, projector):
  """Steps 1, 3 and 6 have new subspaces."""
  if not name.endswith('sm') and projector == 'topk':
    pytest.skip('has no subspace')
  slow, b1, b2, corrected = FLAVOURS[name]
  make, others = getattr(optax_mp, name), {'weight_decay': 0.1}
  if name.endswith('sm'):
    others |= {'rank': 2, 'gap': 3, 'projector': projector}
    choose = {'svd': 'singular_vectors', 'topk': 'largest_rows'}[projector]
    slow = slow | {'new_subspace': getattr(reference, choose)(2), 'gap': 3}
  slow = functools.partial(
    reference.SnSm, b1=b1, b2=b2, corrected=corrected, decay=0.1, **slow
  )
  atol = COORDINATES if name == 'adamw_sm' else SVD
  assert_follows_reference(make(1e-2, **others), slow, MATRICES, 6, atol)


@pytest.mark.parametrize('name', ['adagrad_sn', 'rmsprop_sn', 'sgd_sm'])
def test_other_leaves_have_the_plain_form(name):
  _, b1, b2, corrected = FLAVOURS[name]
  slow = functools.partial(
    reference.SnSm,
    subset_size=None,
    b1=b1,
    b2=b2,
    lr=0.03,
    decay=0.1,
    corrected=corrected,
    denominator=name != 'sgd_sm',
  )
  tx = getattr(optax_mp, name)(
    1e-2,
    weight_decay=0.1,
    matrices=lambda params: jax.tree.map(lambda _: False, params),
    other_learning_rate=0.03,
  )
  assert_follows_reference(tx, slow, [(4, 6), (7,)])


@pytest.mark.parametrize('momentum', [optax.trace(0.9), optax.ema(0.9), None])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_any_momentum_is_the_numerator(momentum, dtype):
  """kind: exact, in float32; the denominator sees the gradient itself."""
  g = jnp.asarray(np.random.default_rng(2).normal(size=(4, 6)), dtype)
  tx = optimizers.scale_by_subset_norm(momentum=momentum)
  plain = optimizers.scale_by_subset_norm()
  inner = momentum or optax.identity()
  state, own = tx.init(g), inner.init(g.astype(jnp.float32))
  other = plain.init(g)
  for x in (g, g**2):
    updates, new = tx.update(x, state, g)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    state = new
    n, own = inner.update(x.astype(jnp.float32), own)
    scaled, other = plain.update(x.astype(jnp.float32), other)
    wanted = n * (scaled / x.astype(jnp.float32))
    # kind: derived. A product of quotients, rounded to the dtype.
    eps = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
      np.float32(updates), np.float32(wanted), rtol=eps
    )


def test_square_axis():
  """The official grouping of (out, in) is 0, of Flax kernels (in, out) -1."""
  g = jnp.asarray(np.random.default_rng(3).normal(size=(6, 6)))
  rows = optimizers.scale_by_subset_norm()
  columns = optimizers.scale_by_subset_norm(square_axis=-1)
  by_row, _ = rows.update(g, rows.init(g))
  by_column, _ = columns.update(g.T, columns.init(g))
  np.testing.assert_array_equal(by_row, by_column.T)
  assert not np.allclose(by_row, by_column)


PROJECTORS = ['svd', 'random', 'topk', 'uniform']


def ranks_of(g, state):
  """What the momentum of a first step spans: N = 0.1 P G + (G - P G)."""
  tx = optimizers.scale_by_subspace_momentum(rank=3, projector=state)
  n, _ = tx.update(g, tx.init(g))
  return (np.asarray(g, np.float64) - n) / 0.9


@pytest.mark.parametrize('shape', [(9, 6), (6, 9)])
@pytest.mark.parametrize('projector', PROJECTORS)
def test_subspaces_are_orthogonal(projector, shape):
  """P G has rank 3, G - P G is orthogonal to it. kind: derived, float32."""
  g = np.random.default_rng(4).normal(size=shape)
  inside = ranks_of(jnp.asarray(g), projector)
  singular = np.linalg.svd(inside, compute_uv=False)
  assert singular[2] > 1e-2 and singular[3] < 1e-5
  assert abs((inside * (g - inside)).sum()) < 1e-4
  if projector == 'svd':
    best = np.linalg.svd(g, compute_uv=False)
    np.testing.assert_allclose(singular[:3], best[:3], rtol=1e-5)


def test_draws_are_even_and_differ_by_leaf_layer_and_period():
  """kind: statistical, 5 sigma of 2000 draws of 3 of 12 rows."""
  tx = optimizers.scale_by_subspace_momentum(
    rank=3, gap=1, projector='uniform', seed=1
  )
  params = {'a': jnp.zeros((250, 12, 3)), 'b': jnp.zeros((250, 12, 3))}
  update = jax.jit(tx.update)
  state, draws = tx.init(params), []
  for _ in range(4):
    _, state = update(params, state)
    draws += [np.asarray(state.projector[k]) for k in params]
  assert len({draw.tobytes() for draw in draws}) == len(draws)
  rows = np.concatenate(draws)
  assert all(len(set(row)) == 3 for row in rows)
  share = np.bincount(rows.ravel(), minlength=12) / len(rows)
  assert np.all(abs(share - 0.25) < 5 * np.sqrt(0.25 * 0.75 / len(rows)))
  _, other = update(params, tx.init(params), layer=jnp.uint32(0))
  assert np.any(other.projector['a'] != draws[0])


@pytest.mark.parametrize('gap', [1, 3])
@pytest.mark.parametrize('projector', PROJECTORS)
def test_new_subspaces_at_the_documented_steps(projector, gap):
  """And the momentum that was is forgotten at those alone. kind: exact."""
  rng = np.random.default_rng(5)
  tx = optimizers.scale_by_subspace_momentum(
    0.9, 2, gap, projector=projector, seed=3
  )
  other = optimizers.scale_by_subspace_momentum(
    0.9, 2, gap, projector=projector, on_refresh='keep', seed=3
  )
  state = tx.init(jnp.zeros((6, 5)))
  update, keep = jax.jit(tx.update), jax.jit(other.update)
  renewed, reset = [], []
  for t in range(1, 8):
    g = jnp.asarray(rng.normal(size=(6, 5)))
    _, kept = keep(g, state)
    _, new = update(g, state)
    if projector != 'random':
      changed = np.any(new.projector != state.projector)
      renewed += [t] * bool(changed)
    reset += [t] * bool(np.any(kept.mu != new.mu))
    state = new
  wanted = [t for t in range(1, 8) if t == 1 or t % gap == 0]
  assert reset == [t for t in wanted if t > 1]  # at first there is nothing
  if projector != 'random':
    assert renewed == wanted


@pytest.mark.parametrize('projector', ['svd', 'topk', 'uniform'])
def test_momentum_that_is_kept_has_its_coordinates_along_new_directions(
  projector,
):
  """kind: derived, float64 with the projectors of the state."""
  rng = np.random.default_rng(5)
  tx = optimizers.scale_by_subspace_momentum(
    0.8, 2, 3, projector=projector, on_refresh='keep', seed=3
  )
  state, update = tx.init(jnp.zeros((6, 5))), quick.jit(tx.update)
  mu, made = 0.0, set()
  for _ in range(7):
    g = rng.normal(size=(6, 5)).astype(np.float32)
    ours, state = update(jnp.asarray(g), state)
    p = np.asarray(state.projector)
    made.add(p.tobytes())
    rows = np.eye(6)[p] if p.ndim == 1 else np.eye(6)
    columns = np.eye(5) if p.ndim == 1 else p.astype(np.float64).T
    x = rows @ g @ columns
    mu = 0.8 * mu + 0.2 * x
    wanted = g + rows.T @ (mu - x) @ columns.T
    np.testing.assert_allclose(ours, wanted, rtol=0.0, atol=2e-6)
  assert len(made) == 3


def test_first_steps_of_rmsprop_are_long():
  """kind: claim. 32 times as long as with a correction of bias."""
  g = jnp.asarray(np.random.default_rng(8).normal(size=(6, 5)))
  params = {'kernel': g}
  tx = optax_mp.rmsprop_sn(-1.0)
  long, _ = tx.update(params, tx.init(params), params)
  short = optimizers.scale_by_subset_norm()
  wanted, _ = short.update(g, short.init(g))
  np.testing.assert_allclose(long['kernel'] / wanted, 32, rtol=0.02)


def test_random_directions_last_as_long():
  """They are not stored: what stays 0 tells where the momentum is."""
  tx = optimizers.scale_by_subspace_momentum(0.5, 2, 3, projector='random')
  g = jnp.asarray(np.random.default_rng(6).normal(size=(6, 5)))
  state, update = tx.init(g), jax.jit(tx.update)
  assert not jax.tree.leaves(state.projector)
  insides = []
  for _ in range(6):
    n, state = update(g, state)
    # Of one gradient, N = (1 - 0.5^k) P G + (G - P G), k steps after a reset.
    insides.append(np.asarray(g - n))
  same = [
    np.linalg.matrix_rank(np.vstack([a, b]), tol=1e-4) == 2
    for a, b in zip(insides, insides[1:], strict=False)
  ]
  assert same == [True, False, True, True, False]


def test_an_svd_is_in_a_branch_only():
  """The others stay out of it: the program's main part decomposes nothing."""
  tx = optimizers.adamw_snsm(1e-3, rank=2, gap=3)
  params = {'kernel': jnp.zeros((6, 5)), 'stack': jnp.zeros((3, 4, 8))}
  text = (
    jax.jit(tx.update)
    .lower(params, tx.init(params), params)
    .compile()
    .as_text()
  )
  always = run_on_every_step(text)
  assert 'gesdd' in text and 'conditional(' in always
  assert 'gesdd' not in always


def run_on_every_step(text):
  """The lines of all computations but those that are branches."""
  bodies, name = {}, None
  for line in text.splitlines():
    if line.endswith('{') and not line.startswith(' '):
      name = 'main' if line.startswith('ENTRY') else line.split()[0]
      bodies[name] = []
    elif name:
      bodies[name].append(line)
  lines, waiting = [], {'main'}
  while waiting:
    body = bodies.pop(waiting.pop())
    lines += body
    called = [line for line in body if 'conditional(' not in line]
    words = set(re.findall(r'%[\w.-]+', '\n'.join(called)))
    waiting |= words & bodies.keys()
  return '\n'.join(lines)


@pytest.mark.parametrize('projector', ['svd', 'topk'])
@pytest.mark.parametrize('size', ['heuristic', -2])
def test_a_stack_is_its_layers(projector, size):
  rng = np.random.default_rng(7)
  scale = np.array([1.0, 9.0, 0.1])[:, None, None]
  grads = [jnp.asarray(rng.normal(size=(3, 8, 6)) * scale) for _ in range(4)]
  tx = optimizers.adamw_snsm(
    1e-2, rank=2, gap=3, projector=projector, subset_size=size, matrices=None
  )
  w = jnp.ones((3, 8, 6))
  together = [params for params, _ in recorded.run(tx, w, grads)]
  for i in range(3):
    apart = recorded.run(tx, w[i], [g[i] for g in grads])
    for (params, _), all_of_them in zip(apart, together, strict=True):
      # kind: derived, sums in another order.
      np.testing.assert_allclose(params, all_of_them[i], rtol=0.0, atol=SVD)


@pytest.mark.parametrize('name', ['rmsprop_sn', 'adamw_snsm'])
def test_zero_rows_and_zero_gradients_stay_finite(name):
  g = jnp.zeros((6, 4)).at[1:, 2:].set(1e5)
  tx = getattr(optax_mp, name)(1e-2)
  step, state = jax.jit(tx.update), tx.init({'kernel': g})
  for x in (jnp.zeros_like(g), g, jnp.zeros_like(g)):
    updates, state = step({'kernel': x}, state, {'kernel': g})
    chex.assert_tree_all_finite((updates, state))
  assert np.all(updates['kernel'][0] == 0)


def test_equal_norms_are_chosen_in_order():
  tx = optimizers.scale_by_subspace_momentum(rank=3, projector='topk')
  g = jnp.ones((7, 4)).at[5].set(2.0)
  _, state = tx.update(g, tx.init(g))
  assert state.projector.tolist() == [5, 0, 1]
  assert state.projector.dtype == jnp.int32


M, N, R = 512, 256, 32


@pytest.mark.parametrize(
  ('make', 'bytes'),
  [
    (optax_mp.adamw_sn, 4 * M * N + 4 * M),
    (functools.partial(optax_mp.adamw_sn, subset_size=-2), 4 * M * N + 4096),
    (optax_mp.rmsprop_sn, 4 * M),
    (optax_mp.adagrad_sn, 4 * M * N + 4 * M),
    (optax_mp.adamw_snsm, 4 * R * (M + N) + 4 * M),
    (optax_mp.adamw_sm, 4 * R * (M + N) + 4 * M * N),
    (optax_mp.adagrad_snsm, 4 * R * (M + N) + 4 * M),
    (optax_mp.sgd_sm, 4 * R * (M + N)),
  ],
)
def test_bytes(make, bytes):
  """Exact; with counts and keys left out."""
  extra = {'rank': R} if 'sm' in getattr(make, '__name__', '') else {}
  assert stored(make(1e-3, **extra)) == bytes
  if extra:
    short = 4 * R * (M + N)
    for kind, own in (
      ('random', 4 * R * M),
      ('topk', 4 * R * N + 4 * R),
      ('uniform', 4 * R * N + 4 * R),
    ):
      assert stored(make(1e-3, projector=kind, **extra)) == bytes - short + own


def stored(tx):
  params = {'kernel': jax.ShapeDtypeStruct((M, N), jnp.bfloat16)}
  rows = memory.plan(tx, params, gradients=None).rows
  names = ('mu', 'nu', 'projector')
  return sum(r.bits for r in rows if r.field.split('.')[-1] in names) // 8


def test_large_leaves_without_subsets_are_warned_of():
  tx = optimizers.scale_by_subset_norm(subset_size=-2)
  with pytest.warns(UserWarning, match='`subset_size`.*one coordinate'):
    tx.init({'kernel': jnp.zeros((1, 4099))})  # a prime
  tx.init({'kernel': jnp.zeros((1, 13))})


def wrong_directions(g, rank, key):
  del rank, key
  return g


@pytest.mark.parametrize(
  ('wrong', 'argument'),
  [
    ({'b1': 1.0}, 'b1'),
    ({'b2': 1.0}, 'b2'),
    ({'eps': 0.0}, 'eps'),
    ({'rank': 0}, 'rank'),
    ({'gap': 1.5}, 'gap'),
    ({'projector': 'fourier'}, 'projector'),
    ({'on_refresh': 'rotate'}, 'on_refresh'),
    ({'subset_size': 0}, 'subset_size'),
    ({'subset_size': 'rows'}, 'subset_size'),
    ({'square_axis': 1}, 'square_axis'),
    ({'projector': wrong_directions}, 'projector'),
  ],
)
def test_errors_name_the_argument(wrong, argument):
  with pytest.raises(ValueError, match=f'`{argument}`.*got'):
    tx = optimizers.adamw_snsm(1e-3, **wrong)
    tx.init({'kernel': jnp.zeros((4, 6))})


def test_sums_have_no_bias_to_correct():
  with pytest.raises(ValueError, match='`bias_correction`.*got'):
    optimizers.scale_by_subset_norm(accumulate=True)
