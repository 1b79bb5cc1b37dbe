# SPDX-License-Identifier: Apache-2.0
"""The examples keep their promises, at a size of seconds."""

import dataclasses
import functools
import runpy
import signal
import threading

import jax
import numpy as np
import pytest

import backward_linen
import demo
from optax_mp import memory
import quick
import train_gpt

SMALL = train_gpt.Config(
  layers=2,
  width=64,
  heads=2,
  context=16,
  batch=2,
  steps=24,
  warmup=4,
  validate_every=12,
  validation_batches=2,
)


def _config(**changes):
  return dataclasses.replace(SMALL, **changes)


# Compared to the last bit, and so compiled as for everybody.
EXACT = [
  _config(optimizer=optimizer, update=update)
  for optimizer in train_gpt.OPTIMIZERS
  for update in ('fused', 'separate')
]


def _quickly(*args):
  with quick.ahead():
    return train_gpt.compile_donated(*args)


@functools.cache
def _setup(config):
  compiler = None if config in EXACT else _quickly
  built = train_gpt.setup(config, compiler=compiler)
  return built._replace(validate=_validate())


@functools.cache
def _validate():
  """One for all: neither optimizer nor update is in it."""
  return quick.jit(train_gpt.loss_of(SMALL))


def _train(config):
  """Compiles each program once, whatever the length and the checkpoints."""
  plain = {'checkpoint': '', 'save_every': 100}
  return train_gpt.train(config, _setup(dataclasses.replace(config, **plain)))


def _losses(config, steps=None):
  """Losses of the first `steps` steps; then the reader stops reading."""
  records = _train(config)
  losses = {}
  for record in records:
    losses[record.step] = record.loss
    if record.step == steps:
      records.close()
  return losses


@pytest.mark.parametrize('optimizer', train_gpt.OPTIMIZERS)
def test_both_updates_give_identical_losses(optimizer):
  """Exact, on the CPU."""
  fused, separate = (
    _losses(_config(optimizer=optimizer, update=update))
    for update in ('fused', 'separate')
  )
  assert fused == separate
  assert len(fused) == SMALL.steps


@pytest.mark.parametrize('optimizer', train_gpt.OPTIMIZERS)
def test_the_update_in_the_backward_pass_gives_the_same_losses(optimizer):
  """Clipping included. kind: derived: 24 steps of float32, or of bfloat16."""
  fused, in_backward = (
    list(_losses(_config(optimizer=optimizer, update=update)).values())
    for update in ('fused', 'in-backward')
  )
  tolerance = 2**-8 if optimizer == 'adamw_plain_bf16' else 1e-4
  np.testing.assert_allclose(in_backward, fused, rtol=tolerance)


@pytest.mark.parametrize('update', ['fused', 'separate', 'in-backward'])
@pytest.mark.parametrize('optimizer', train_gpt.OPTIMIZERS)
def test_all_parameters_and_state_are_reused(optimizer, update):
  """Exact: alias bytes are those of parameters and state."""
  built = _setup(_config(optimizer=optimizer, update=update))
  size = sum(
    x.size * x.dtype.itemsize
    for x in jax.tree.leaves((built.shapes.params, built.shapes.opt_state))
  )
  aliased = [memory.report(p).alias_bytes for p in built.programs.values()]
  assert sum(aliased) == size


def test_a_donation_that_did_not_happen_is_loud():
  def halve(x):
    return x.astype('bfloat16')

  with pytest.raises(RuntimeError, match='donates 400 bytes but reuses 0'):
    train_gpt.compile_donated(halve, (0,), jax.ShapeDtypeStruct((100,), 'f4'))


@pytest.mark.parametrize('update', ['fused', 'separate'])
@pytest.mark.parametrize('bits', [16, 8])
def test_resuming_gives_the_same_losses(tmp_path, bits, update):
  """Exact: stopped after steps 5, 6 and 13, then run to the end."""
  config = _config(residual_bits=bits, update=update)
  expected = _losses(config)
  stopped = dataclasses.replace(config, checkpoint=str(tmp_path), save_every=7)
  losses = {}
  for steps in (5, 6, 13, None):
    losses |= _losses(stopped, steps)
  assert losses == expected


@pytest.fixture
def own_handler():
  """Python's: a library that another test has loaded may have left its own."""
  old = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, old)


@pytest.mark.usefixtures('own_handler')
def test_ctrl_c_saves_the_last_finished_step(tmp_path):
  """Exact: the signal comes from outside, whenever it comes."""
  config = _config(checkpoint=str(tmp_path), steps=200)
  expected = _losses(_config(steps=200))
  losses = {}
  records = _train(config)
  timer = threading.Timer(0.01, signal.raise_signal, [signal.SIGINT])
  with pytest.raises(KeyboardInterrupt):
    for record in records:
      losses[record.step] = record.loss
      if record.step == 10:
        timer.start()
      if record.step == 190:
        timer.join()  # a busy machine may be late
  assert len(losses) < 200
  records.close()
  losses |= _losses(config)
  missing = expected.keys() - losses.keys()
  assert {k: expected[k] for k in losses} == losses
  assert len(missing) <= 1  # saved, but never reported


def test_another_run_is_not_resumed(tmp_path):
  config = _config(checkpoint=str(tmp_path))
  _losses(config, 2)
  other = dataclasses.replace(config, learning_rate=0.5)
  with pytest.raises(ValueError, match=r"'learning_rate': \(0.001, 0.5\)"):
    _losses(other)


def test_the_text_is_split_and_batches_depend_on_seed_and_step_only():
  text, validation = train_gpt.load_text()
  assert len(text) > 1e6 and abs(len(validation) / len(text) - 1 / 9) < 1e-3
  config = _config()
  first = train_gpt.training_batch(text, config, 3)
  np.testing.assert_array_equal(
    first, train_gpt.training_batch(text, config, 3)
  )
  for other in (_config(seed=1), config):
    step = 3 if other.seed else 4
    assert np.any(first != train_gpt.training_batch(text, other, step))


def test_weight_decay_is_for_matrices():
  built = _setup(_config(optimizer='adamw_fp32'))
  mask = train_gpt._decayed(built.shapes.params)
  shapes = jax.tree.map(lambda m, p: (m, p.ndim), mask, built.shapes.params)
  assert shapes['bytes']['embedding'] == (True, 2)
  assert shapes['blocks']['qkv']['kernel'] == (True, 3)
  assert shapes['blocks']['qkv']['bias'] == (False, 2)
  assert shapes['norm']['scale'] == (False, 1)


def test_own_text(tmp_path):
  (tmp_path / 'mine.txt').write_text('to be or not to be ' * 500)
  losses = _losses(_config(text=str(tmp_path / 'mine.txt'), steps=60))
  assert losses[60] < 0.8 * losses[1]  # claim: it learns so simple a text


@pytest.mark.usefixtures('quickly')
def test_demo_writes_plot_and_numbers(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(train_gpt, 'Config', lambda **kw: _config(**kw))
  few = ('adamw_fp32', 'recomputed', 'in_backward')
  runs = {key: name for key, name in demo.RUNS.items() if key in few}
  monkeypatch.setattr(demo, 'RUNS', runs)
  monkeypatch.setattr(
    'sys.argv', ['demo.py', '--steps', '10', '--out', str(tmp_path)]
  )
  demo.main()
  assert (tmp_path / 'demo.png').stat().st_size > 10_000
  assert (tmp_path / 'demo.json').exists()
  assert 'peak MB' in capsys.readouterr().out


def test_digits(capsys):
  """Claim: over 95 % of the test images."""
  runpy.run_module('digits_linen', run_name='__main__')
  printed = capsys.readouterr().out
  assert float(printed.split()[-1]) > 0.95


@pytest.mark.parametrize('half', ['bfloat16', 'float16'])
def test_a_linen_stack_in_the_backward_pass(half, capsys):
  """Claim: over 85 % after a few epochs; the first scales are too large."""
  assert backward_linen.main(['--half', half, '--epochs', '6']) > 0.85
  skipped = int(capsys.readouterr().out.split()[-2])
  assert (skipped > 0) == (half == 'float16')
