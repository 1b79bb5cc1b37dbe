# SPDX-License-Identifier: Apache-2.0
"""Processes that compile for TPUs and GPUs, so that the caller's never does.

The compilers come inside of JAX's plugins. Loading one into a process takes its
TPU or GPU if there is one, needs environment variables, and a compiler that
crashes takes the process along. So a program travels, as `jax.export` writes
it, to a process of ours that stays for the next one.
"""

import atexit
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import threading
from typing import Any

from jax import export
from jax.experimental import topologies

from optax_mp.memory import _targets
from optax_mp.memory import _xla

# Without them libtpu asks the cloud which TPU this machine has. The name of the
# topology decides what is compiled for, not the type given here.
_ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
_PROGRAM = 'from optax_mp.memory import _worker; _worker.main()'


class Worker:
  """A process that answers one request after the other."""

  def __init__(self):
    self.folder = tempfile.TemporaryDirectory(prefix='optax_mp_')
    root = pathlib.Path(self.folder.name)
    (root / 'dump').mkdir()
    self.log = root / 'log'
    flags = f'--xla_dump_to={root / "dump"} --xla_dump_hlo_as_text'
    package = pathlib.Path(__file__).parents[2]
    path = os.pathsep.join([str(package), *filter(None, sys.path)])
    with self.log.open('wb') as log:
      self.process = subprocess.Popen(
        [sys.executable, '-c', _PROGRAM, str(root / 'dump')],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={
          **os.environ,
          **_ENVIRONMENT,
          'XLA_FLAGS': flags,
          'PYTHONPATH': path,
        },
      )

  def ask(self, *request: Any) -> Any:
    """Sends a request, as `_answer` takes it, and waits for the answer."""
    process = self.process
    assert process.stdin is not None and process.stdout is not None
    try:
      pickle.dump(request, process.stdin)
      process.stdin.flush()
      failed, answer = pickle.load(process.stdout)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
      process.kill()
      said = self.log.read_text(errors='replace')[-2000:]
      raise RuntimeError(
        f'The compiler died with exit code {process.wait()}: {said}'
      ) from None
    if failed:
      raise RuntimeError(f'The compiler failed: {answer}')
    return answer

  def close(self) -> None:
    """Ends the process."""
    self.process.kill()
    self.process.communicate()
    self.folder.cleanup()


_idle: dict[str, list[Worker]] = {}
_lock = threading.Lock()


def ask(platform: str, *request: Any) -> Any:
  """Asks a process that has loaded this platform's plugin, or a new one.

  Args:
    platform: 'tpu' or 'cuda'.
    *request: as `_answer` takes it.

  Returns:
    The answer.

  Raises:
    RuntimeError: if the compiler fails or dies, with its words.
  """
  worker = _take(platform)
  try:
    return worker.ask(*request)
  finally:
    with _lock:
      _idle.setdefault(platform, []).append(worker)


def _take(platform: str) -> Worker:
  """A process that waits for work, or a new one."""
  with _lock:
    while workers := _idle.get(platform):
      worker = workers.pop()
      if worker.process.poll() is None:
        return worker
      worker.close()
  return Worker()


@atexit.register
def _close() -> None:
  for worker in sum(_idle.values(), []):
    worker.close()


def _answer(dump: pathlib.Path, question: str, *args: Any) -> Any:
  if question == 'known':
    return [name for name in args if _is_known(_targets.find(name))]
  program, job = args
  return _xla.compile_exported(export.deserialize(program), job, dump)


def _is_known(target: _targets.Target) -> bool:
  """Whether the installed compiler knows the device."""
  try:
    topologies.get_topology_desc(**target.topology(1))
  except Exception:  # whatever the plugin raises, it does not know it
    return False
  return True


def main() -> None:
  """Answers until the caller is gone."""
  requests = sys.stdin.buffer
  answers = os.fdopen(os.dup(1), 'wb')
  os.dup2(2, 1)  # what a plugin prints is no answer
  dump = pathlib.Path(sys.argv[1])
  while True:
    try:
      request = pickle.load(requests)
    except EOFError:
      return
    try:
      answer = False, _answer(dump, *request)
    except Exception as error:
      answer = True, f'{type(error).__name__}: {error}'
    pickle.dump(answer, answers)
    answers.flush()
