# SPDX-License-Identifier: Apache-2.0
"""What examples and benchmarks write is whole, or not written."""

import dataclasses
import errno
import os

from matplotlib import figure
import pytest

import files
import results
import small_gpt
import train_gpt

DAMAGED = [b'', b'{"a": 1', b'null', b'[1, 2]', b'\xff\xfe']


def _no_room(*_):
  raise OSError(errno.ENOSPC, 'No space left on device')


@pytest.mark.parametrize('fault', ['fsync', 'replace'])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, fault):
  path = tmp_path / 'a.json'
  files.write_text(path, '{"a": 1}')
  monkeypatch.setattr(os, fault, _no_room)
  with pytest.raises(OSError, match='No space'):
    files.write_text(path, '{"a": 2}')
  monkeypatch.undo()
  assert files.read_json(path, '') == {'a': 1}
  assert os.listdir(tmp_path) == ['a.json']
  files.write_text(path, '{"a": 3}')
  assert files.read_json(path, '') == {'a': 3}


def test_a_full_disk_at_the_first_start(tmp_path, monkeypatch):
  """The same command runs once there is room."""
  config = small_gpt.config(checkpoint=str(tmp_path))
  monkeypatch.setattr(os, 'fsync', _no_room)
  with pytest.raises(OSError, match='No space'):
    train_gpt.Checkpoints(config)
  monkeypatch.undo()
  train_gpt.Checkpoints(config)
  train_gpt.Checkpoints(config)


@pytest.mark.parametrize('damage', DAMAGED)
def test_a_damaged_config_says_the_way_out(tmp_path, damage):
  config = small_gpt.config(checkpoint=str(tmp_path))
  path = tmp_path / 'config.json'
  path.write_bytes(damage)
  with pytest.raises(ValueError, match=r'config\.json` is damaged.* Remove it'):
    train_gpt.Checkpoints(config)
  path.unlink()
  train_gpt.Checkpoints(config)
  with pytest.raises(ValueError, match='another run'):
    train_gpt.Checkpoints(dataclasses.replace(config, seed=1))


def test_a_kill_while_the_config_is_written(tmp_path):
  """What is left of it is in nobody's way."""
  (tmp_path / '.config.json.123').write_text('{"text')
  train_gpt.Checkpoints(small_gpt.config(checkpoint=str(tmp_path)))


def test_results_are_whole(tmp_path, monkeypatch):
  """Hours of results are not lost to the attempt to save more of them."""
  drawn = figure.Figure()
  results.save('some', {'rows': 1}, drawn, tmp_path)
  monkeypatch.setattr(os, 'replace', _no_room)
  with pytest.raises(OSError, match='No space'):
    results.save('some', {'rows': 2}, drawn, tmp_path)
  assert results.load('some', tmp_path)['rows'] == 1


@pytest.mark.parametrize('damage', DAMAGED)
def test_damaged_results_say_the_way_out(tmp_path, damage):
  (tmp_path / 'some.json').write_bytes(damage)
  with pytest.raises(ValueError, match=r'some\.json` is damaged.* Remove it'):
    results.load('some', tmp_path)
