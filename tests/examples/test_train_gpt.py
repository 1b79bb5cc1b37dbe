# SPDX-License-Identifier: Apache-2.0
"""train_gpt.py and demo.py keep their promises, at a size of seconds."""

import dataclasses

import jax
import numpy as np
import pytest

import demo
from optax_mp import memory
import small_gpt
import train_gpt


@pytest.mark.parametrize('optimizer', train_gpt.OPTIMIZERS)
def test_both_updates_give_identical_losses(optimizer):
  """Exact, on the CPU."""
  fused, separate = (
    small_gpt.losses(small_gpt.config(optimizer=optimizer, update=update))
    for update in ('fused', 'separate')
  )
  assert fused == separate
  assert len(fused) == small_gpt.SMALL.steps


@pytest.mark.parametrize('optimizer', train_gpt.OPTIMIZERS)
def test_the_update_in_the_backward_pass_gives_the_same_losses(optimizer):
  """Clipping included. kind: derived: 24 steps of float32, or of bfloat16."""
  fused, in_backward = (
    list(
      small_gpt.losses(
        small_gpt.config(optimizer=optimizer, update=update)
      ).values()
    )
    for update in ('fused', 'in-backward')
  )
  tolerance = 2**-8 if optimizer == 'adamw_plain_bf16' else 1e-4
  np.testing.assert_allclose(in_backward, fused, rtol=tolerance)


@pytest.mark.parametrize('update', ['fused', 'separate', 'in-backward'])
@pytest.mark.parametrize('optimizer', train_gpt.OPTIMIZERS)
def test_all_parameters_and_state_are_reused(optimizer, update):
  """Exact: alias bytes are those of parameters and state."""
  built = small_gpt.setup(small_gpt.config(optimizer=optimizer, update=update))
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
  config = small_gpt.config(residual_bits=bits, update=update)
  expected = small_gpt.losses(config)
  stopped = dataclasses.replace(config, checkpoint=str(tmp_path), save_every=7)
  losses = {}
  for steps in (5, 6, 13, None):
    losses |= small_gpt.losses(stopped, steps)
  assert losses == expected


def test_another_run_is_not_resumed(tmp_path):
  config = small_gpt.config(checkpoint=str(tmp_path))
  small_gpt.losses(config, 2)
  other = dataclasses.replace(config, learning_rate=0.5)
  with pytest.raises(ValueError, match=r"'learning_rate': \(0.001, 0.5\)"):
    small_gpt.losses(other)


def test_the_text_is_split_and_batches_depend_on_seed_and_step_only():
  text, validation = train_gpt.load_text()
  assert len(text) > 1e6 and abs(len(validation) / len(text) - 1 / 9) < 1e-3
  config = small_gpt.config()
  first = train_gpt.training_batch(text, config, 3)
  np.testing.assert_array_equal(
    first, train_gpt.training_batch(text, config, 3)
  )
  for other in (small_gpt.config(seed=1), config):
    step = 3 if other.seed else 4
    assert np.any(first != train_gpt.training_batch(text, other, step))


def test_weight_decay_is_for_matrices():
  built = small_gpt.setup(small_gpt.config(optimizer='adamw_fp32'))
  mask = train_gpt._decayed(built.shapes.params)
  shapes = jax.tree.map(lambda m, p: (m, p.ndim), mask, built.shapes.params)
  assert shapes['bytes']['embedding'] == (True, 2)
  assert shapes['blocks']['qkv']['kernel'] == (True, 3)
  assert shapes['blocks']['qkv']['bias'] == (False, 2)
  assert shapes['norm']['scale'] == (False, 1)


def test_own_text(tmp_path):
  (tmp_path / 'mine.txt').write_text('to be or not to be ' * 500)
  losses = small_gpt.losses(
    small_gpt.config(text=str(tmp_path / 'mine.txt'), steps=60)
  )
  assert losses[60] < 0.8 * losses[1]  # claim: it learns so simple a text


@pytest.mark.usefixtures('quickly')
def test_demo_writes_plot_and_numbers(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(train_gpt, 'Config', lambda **kw: small_gpt.config(**kw))
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
