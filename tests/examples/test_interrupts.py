# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C loses no step: each is reported once, and no run repeats one."""

import signal
import threading

import numpy as np
import pytest

import small_gpt
import train_gpt


@pytest.fixture
def own_handler():
  """Python's: a library that another test has loaded may have left its own."""
  old = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, old)


def _counting(interrupt):
  """A stand-in for the compiled step, which counts; the loss is the count."""

  def step(state, tokens):
    interrupt('step', int(state.params))
    return train_gpt.State(
      np.asarray(state.params + 1), state.opt_state
    ), state.params

  def validate(params, tokens):
    interrupt('validation', int(params) - 1)
    return params

  zero = train_gpt.State(np.array(0, np.int32), np.array(0, np.int32))
  return train_gpt.Setup(lambda: zero, zero, None, step, {}, validate)


def _raise(*_):
  signal.raise_signal(signal.SIGINT)


def _counted(tmp_path, **changes):
  (tmp_path / 'text').write_text('to be or not to be ' * 9)
  changes = {'text': str(tmp_path / 'text'), 'context': 4, **changes}
  return small_gpt.config(checkpoint=str(tmp_path / 'run'), steps=6, **changes)


@pytest.mark.usefixtures('own_handler')
@pytest.mark.parametrize('at', [0, 3, 5])
@pytest.mark.parametrize('place', ['step', 'validation', 'save'])
def test_each_step_is_reported_once(tmp_path, monkeypatch, place, at):
  """Exact: Ctrl-C in the middle of something; then the same command again."""
  config = _counted(tmp_path, validate_every=1, save_every=1)
  reported, came = [], []

  def interrupt(where, step):
    if (where, step) == (place, at) and not came:
      came.append(step)
      _raise()

  save = train_gpt.Checkpoints.save

  def slow_save(self, state, step):
    interrupt('save', step - 1)
    save(self, state, step)

  monkeypatch.setattr(train_gpt.Checkpoints, 'save', slow_save)
  with pytest.raises(KeyboardInterrupt):
    for record in train_gpt.train(config, _counting(interrupt)):
      reported.append(record)
  assert came == [at]
  assert [record.step for record in reported] == list(range(1, at + 2))
  reported += train_gpt.train(config, _counting(interrupt))
  assert [record.step for record in reported] == list(range(1, 7))
  assert [record.loss for record in reported] == list(range(6))


@pytest.mark.usefixtures('own_handler')
def test_who_stops_reading_gets_the_interrupt_too(tmp_path):
  """Between two steps Ctrl-C is Python's own again, or the program's."""
  mine = signal.getsignal(signal.SIGINT)
  records = train_gpt.train(_counted(tmp_path), _counting(_raise))
  assert next(records).step == 1
  assert signal.getsignal(signal.SIGINT) is mine
  with pytest.raises(KeyboardInterrupt):
    records.close()
  assert train_gpt.Checkpoints(_counted(tmp_path)).manager.latest_step() == 1


def test_ctrl_c_in_the_last_save_comes_after_it(tmp_path, monkeypatch):
  asked = []
  old = signal.signal(signal.SIGINT, lambda *_: asked.append('asked'))
  try:
    records = train_gpt.train(_counted(tmp_path), _counting(lambda *_: None))
    next(records)
    save = train_gpt.Checkpoints.save

    def interrupted(*args):
      _raise()
      assert not asked
      save(*args)

    monkeypatch.setattr(train_gpt.Checkpoints, 'save', interrupted)
    records.close()
  finally:
    signal.signal(signal.SIGINT, old)
  assert asked == ['asked']
  assert train_gpt.Checkpoints(_counted(tmp_path)).manager.latest_step() == 1


@pytest.mark.usefixtures('own_handler')
def test_ctrl_c_saves_the_last_finished_step(tmp_path):
  """Exact: the signal comes from outside, whenever it comes."""
  config = small_gpt.config(checkpoint=str(tmp_path), steps=200)
  expected = small_gpt.losses(small_gpt.config(steps=200))
  losses = {}
  records = small_gpt.train(config)
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
  losses |= small_gpt.losses(config)
  missing = expected.keys() - losses.keys()
  assert {k: expected[k] for k in losses} == losses
  assert len(missing) <= 1  # a signal between the step's end and the report
