# SPDX-License-Identifier: Apache-2.0
"""`python -m optax_mp.memory`: the program, its sizes and its search."""

import dataclasses
import json
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_mp
from optax_mp import memory
from optax_mp.memory import __main__ as program
from optax_mp.memory import _fit
from optax_mp.memory import _survey
from optax_mp.memory import gpt
import quick

H100 = ['--target', 'h100']
TINY = ['--layers', '2', '--width', '128', '--context', '64', '--batch', '2']


needs_h100 = pytest.mark.skipif(
  'h100' not in memory.targets(), reason="pip install 'optax_mp[gpu]'"
)


def _rows(text):
  """The table's cells by recipe."""
  table = text.split('\n\n')[1].splitlines()
  return {
    cells[0]: cells[1:]
    for cells in (re.split(r' {2,}', line) for line in table[1:])
  }


@needs_h100
def test_prints_and_draws_a_table(capsys, tmp_path):
  """Of three: all that the package exports would take a minute."""
  figure = tmp_path / 'plot.png'
  names = ['optax.adamw, float32', 'optax.adamw, bfloat16', 'adamw_8bit']
  only = [f'--only={name}' for name in names]
  program.main([*TINY, *H100, *only, '--plot', str(figure)])
  text = capsys.readouterr().out
  rows = _rows(text)
  assert set(rows) == set(names)
  assert rows['optax.adamw, float32'][0] == '16.00'
  assert rows['optax.adamw, bfloat16'][0] == '8.00'
  assert {row[-1] for row in rows.values()} == {'yes'}
  assert 'XLA_PYTHON_CLIENT_MEM_FRACTION' in text
  # Then the whole report of the recipe that was asked for.
  assert 'residual' in text.split('\n\n')[-1]
  assert figure.read_bytes().startswith(b'\x89PNG')


@needs_h100
def test_residual_bits_reach_the_recipes(capsys):
  only = [f'--only={name}' for name in ('adamw_bf16', 'sgdm_bf16')]
  program.main([*TINY, *H100, '--residual-bits', '8', *only])
  rows = _rows(capsys.readouterr().out)
  assert set(rows) == {'adamw_bf16', 'sgdm_bf16'}
  assert float(rows['adamw_bf16'][0]) == pytest.approx(11, abs=0.1)
  assert float(rows['sgdm_bf16'][0]) == pytest.approx(8, abs=0.1)


@needs_h100
def test_updates_in_the_backward_pass_have_rows(capsys):
  """Exact: 2 B of gradients less, but for what is outside the layers."""
  names = ['optax.adamw, bfloat16', 'optax.adamw, bfloat16, in backward']
  flags = ['--vocabulary', '256', *H100]
  program.main([*TINY, *flags, *(f'--only={name}' for name in names)])
  rows = _rows(capsys.readouterr().out)
  size = gpt.Size(2, 128, vocabulary=256, context=64, batch=2)
  rest, stack = gpt.halves(gpt.shapes(size, 'bfloat16'))
  outside = sum(x.size for x in jax.tree.leaves(rest)) / size.num_params
  whole, ours = (float(rows[name][0]) for name in names)
  assert whole == 8
  assert ours == pytest.approx(6 + 2 * outside, abs=0.01)


def test_recipes_are_what_the_package_exports(monkeypatch):
  """A new recipe needs no line here."""

  def fancy(learning_rate, b1=0.9):
    return optax.adam(learning_rate, b1)

  monkeypatch.setattr(optax_mp, 'fancy', fancy, raising=False)
  monkeypatch.setattr(optax_mp, '__all__', (*optax_mp.__all__, 'fancy'))
  names = [r.name for r in program.recipes(16)][2:]
  assert {'adamw_8bit', 'adamw_bf16', 'muon_8bit'} < set(names)
  assert names[-1] == 'fancy'
  papers = [r.name for r in program.papers()]
  assert {'came', 'galore', 'micro_adam'} < set(papers)
  assert not set(papers) & set(names)


def test_a_papers_optimizer_has_a_row_if_asked_for():
  """Without being compiled; the others need minutes."""
  known = program.recipes() + program.papers()
  (recipe,) = program.only(['adalomo'], known)
  assert recipe.name == 'adalomo'
  size = gpt.Size(2, 128, context=64)
  params = gpt.shapes(size, recipe.dtype)
  init, step = recipe.step()
  state = jax.eval_shape(init, params)
  new, *_ = jax.eval_shape(step, params, state, gpt.tokens(size))
  assert jax.tree.structure(new) == jax.tree.structure(params)


@pytest.mark.parametrize(
  'argv, message',
  [
    (['--target', 'h1000'], 'argument --target: invalid choice'),
    ([], '`--params`, or `--layers` and `--width`, must be given; got'),
    (['--layers', '2'], 'must be given; got `--layers` 2 and `--width` None'),
    (
      ['--params', '7e9', '--layers', '2', '--width', '128'],
      '`--params` must agree .* got 7e[+]09, and 2 layers of width 128 with',
    ),
    ([*TINY[:3], '100'], '`width` must be a multiple of 64'),
    ([*TINY, '--batch', '0'], '`batch` must be positive; got 0'),
    ([*TINY, '--optimizer', 'adamw'], "`--optimizer` must be one of .*; got"),
    ([*TINY, '--only', 'adamw'], "`--only` must be one of .*; got 'adamw'"),
    (
      [*TINY, '--only', 'lion_8bit', '--optimizer', 'lion_bf16'],
      r"`--optimizer` must be one of \['lion_8bit'\]; got 'lion_bf16'",
    ),
    ([*TINY, '--devices', '9'], '`mesh` must lie|has no compiler here'),
    ([*TINY, '--devices', '0'], '`--devices` must be positive; got 0'),
    (['--params', 'nan'], '`--params` must be positive; got nan'),
    (['--params', '1e6'], 'got 1e[+]06, and 1 layers of width 64 with a vocab'),
    ([*TINY, '--plot', '/nowhere/x.png'], "`--plot` must be .*; got '/now"),
    ([*TINY, '--plot', 'x.foo'], "`--plot` must be .*pdf.*; got 'x.foo'"),
  ],
)  # fmt: skip
def test_errors_are_one_line(argv, message):
  done = subprocess.run(
    [sys.executable, '-m', 'optax_mp.memory', *argv],
    capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode
  assert 'Traceback' not in done.stderr
  assert re.search(message, done.stderr)


@pytest.mark.parametrize('params', [124e6, 1e9, 7e9, 13e9, 70e9, 175e9])
def test_a_number_of_parameters_is_enough(params):
  arguments = program.parse(['--params', str(params)])
  size = program.size_of(arguments)
  assert size.num_params == pytest.approx(params, rel=0.15)
  assert 50 < size.width / size.layers < 250


def test_layers_and_width_need_no_number_of_parameters():
  """Exact: nor does a long context make them disagree with one."""
  flags = ['--layers', '2', '--width', '128', '--context', '100000']
  size = program.size_of(program.parse(flags))
  assert (size.layers, size.width, size.context) == (2, 128, 100_000)


def test_the_models_everyone_knows():
  """Exact: GPT-2's four sizes, as published, but for 47 words added."""
  for layers, width, params in (
    (12, 768, 124_439_808),
    (24, 1024, 354_823_168),
    (36, 1280, 774_030_080),
    (48, 1600, 1_557_611_200),
  ):
    size = gpt.Size(layers, width, vocabulary=50257)
    assert size.num_params == params


def test_the_model_learns():
  """A scan over layers that are not used would not."""
  size = gpt.Size(1, 64, vocabulary=32, context=16, batch=8)
  keys = iter(jax.random.split(jax.random.key(0), 20))
  params = jax.tree.map(
    lambda x: 0.1 * jax.random.normal(next(keys), x.shape).astype(x.dtype),
    gpt.shapes(size, jnp.bfloat16),
  )
  tx = optax_mp.adamw_bf16(1e-2, min_size=0)
  state = tx.init(params)
  step = quick.jit(gpt.make_step(tx))
  tokens = jnp.arange(8 * 17).reshape(8, 17) % 32
  losses = []
  for _ in range(60):
    params, state, loss = step(params, state, tokens)
    losses.append(float(loss))
  assert losses[-1] < 0.2 * losses[0]
  grads = quick.jit(jax.grad(gpt.loss_fn))(params, tokens)
  assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads))


def _report(peak, capacity=100):
  return types.SimpleNamespace(
    peak_bytes=peak, capacity_bytes=capacity, fits=peak <= capacity
  )


@pytest.mark.parametrize('first', [1, 2, 7, 30, 33, 500])
@pytest.mark.parametrize(
  'peak, most',
  [
    (lambda n: 3 * n + 4, 32),
    (lambda n: 3 * n + 1, 33),
    (lambda n: 10 * n + 95, 0),
    (lambda n: n + 99, 1),
    # As the compiler does where memory becomes scarce, and by leaps.
    (lambda n: min(3 * n + 4, 90 + n / 8), 80),
    (lambda n: n * n // 3, 17),
  ],
)
def test_the_most_layers_that_fit(peak, most, first):
  """Exact: it ends between one that fits and one that does not."""
  asked = []

  def report(layers):
    assert layers >= 1 and layers not in asked
    asked.append(layers)
    return _report(peak(layers))

  assert _fit.most_layers(report, first) == most
  assert len(asked) <= 24


def test_a_straight_line_needs_few_compilations():
  asked = []

  def report(layers):
    asked.append(layers)
    return _report(2.31e9 * layers + 1.7e9, 85e9)

  assert _fit.most_layers(report, 32) == 36
  assert len(asked) <= 4


@needs_h100
def test_fit_prints_the_most(capsys, monkeypatch):
  real = _survey.compile_step

  def compile_step(recipe, size, target, num_devices):
    # A small device, of which the arguments alone decide.
    report = real(recipe, size, target, num_devices)
    capacity = 9_000_000
    return dataclasses.replace(
      report, capacity_bytes=capacity, fits=report.argument_bytes < capacity,
      peak_bytes=report.argument_bytes,
    )  # fmt: skip

  monkeypatch.setattr(_survey, 'compile_step', compile_step)
  expected = {'optax.adamw, float32': 3, 'lion_bf16': 6}
  flags = ['--vocabulary', '256', *H100, '--fit']
  flags += [f'--only={name}' for name in expected]
  # From 4 it goes down for one of them, and up for the other.
  program.main([*TINY, '--layers', '4', *flags])
  rows = _rows(capsys.readouterr().out)
  layers = {name: int(cells[-2]) for name, cells in rows.items()}
  # A layer has 198,272 parameters, kept in 12 and 7 bytes.
  assert layers == expected


@pytest.mark.parametrize(
  'target, in_backward', [('h100', False), ('tpu-v6e', False), ('h100', True)]
)
def test_several_devices_share_everything(target, in_backward):
  """Claim: each of 4 has a quarter, but for vectors, and gathers weights."""
  if target not in memory.targets():
    pytest.skip(f'no compiler for {target}')
  size = gpt.Size(2, 256, vocabulary=512, context=64)
  recipe = _survey.Recipe('r', optax_mp.adamw_bf16(1e-4), jnp.bfloat16)
  if in_backward:
    recipe = program.in_backward(recipe)
  one, four = (_survey.compile_step(recipe, size, target, n) for n in (1, 4))
  assert one.argument_bytes / four.argument_bytes > 3.5
  assert four.alias_bytes > 0.99 * (four.argument_bytes - 4 * 65)
  # Gradients and activations, too: the batch is as large on each.
  assert four.temporary_bytes < 1.1 * one.temporary_bytes
  assert four.num_devices == 4
  json.dumps(four.to_dict())
