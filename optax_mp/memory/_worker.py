# SPDX-License-Identifier: Apache-2.0
"""Processes that compile for TPUs and GPUs, so that the caller's never does.

The compilers come inside of JAX's plugins. Loading one into a process takes its
TPU or GPU if there is one, needs environment variables, and a compiler that
crashes takes the process along. So a program travels, as `jax.export` writes
it, to a process of ours that stays for the next one.
"""

import atexit
import contextlib
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from typing import Any

import jax
from jax import export
from jax.experimental import topologies

from optax_mp.memory import _target
from optax_mp.memory import _targets
from optax_mp.memory import _xla

# Without them libtpu asks the cloud which TPU this machine has. The name of the
# topology decides what is compiled for, not the type given here.
_ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'JAX_ENABLE_COMPILATION_CACHE': 'false',  # what is cached is not dumped
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
_FOLDER = 'optax_mp_{}_'  # of the process with that number

# What this process can import, the other can, behind what Python itself has.
_PROGRAM = """
import sys
sys.path += [path for path in sys.argv[1:] if path not in sys.path]
from optax_mp.memory import _worker
_worker.main()
"""


class Worker:
  """A process that answers one request after the other."""

  def __init__(self):
    package = str(pathlib.Path(__file__).parents[2])
    self.log = tempfile.TemporaryFile()
    self.process = subprocess.Popen(
      [sys.executable, '-c', _PROGRAM, package, *filter(None, sys.path)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self.log,
      env={**os.environ, **_ENVIRONMENT},
      start_new_session=True,  # Ctrl-C is for the caller
    )

  def ask(self, *request: Any) -> tuple[bool, Any]:
    """Sends a request and waits for the answer.

    Args:
      *request: as `_answer` takes it.

    Returns:
      Whether it failed, and the answer, or else why.

    Raises:
      RuntimeError: if the process died.
    """
    process = self.process
    assert process.stdin is not None and process.stdout is not None
    try:
      pickle.dump(request, process.stdin)
      process.stdin.flush()
      return pickle.load(process.stdout)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
      process.kill()
      code = process.wait()
      self.log.seek(0)
      said = self.log.read().decode(errors='replace')[-2000:]
      raise RuntimeError(
        f'The compiler died with exit code {code}: {said}'
      ) from None

  def close(self) -> None:
    """Ends the process, which then removes what it wrote."""
    assert self.process.stdin is not None and self.process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
      self.process.stdin.close()
    try:
      self.process.wait(timeout=2)
    except subprocess.TimeoutExpired:  # it is compiling
      self.process.kill()
      self.process.wait()
    self.process.stdout.close()
    self.log.close()
    temporary = pathlib.Path(tempfile.gettempdir())
    for folder in temporary.glob(_FOLDER.format(self.process.pid) + '*'):
      shutil.rmtree(folder, ignore_errors=True)  # it was killed


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
    failed, answer = worker.ask(*request)
  except BaseException:
    # Interrupted: an answer may come that nobody waits for.
    worker.process.kill()
    worker.close()
    raise
  with _lock:
    _idle.setdefault(platform, []).append(worker)
  if failed:
    raise RuntimeError(f'The compiler failed: {answer}')
  return answer


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


# A fork has copies of the pipes, not processes of its own.
os.register_at_fork(after_in_child=_idle.clear)


def _answer(dump: pathlib.Path, question: str, *args: Any) -> Any:
  if question == 'known':
    return [name for name in args if _is_known(_targets.find(name))]
  program, job = args
  return _xla.compile_exported(export.deserialize(program), job, dump)


def _is_known(target: _target.Target) -> bool:
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
  # Arguments come with their dtypes.
  jax.config.update('jax_enable_x64', True)
  prefix = _FOLDER.format(os.getpid())
  with tempfile.TemporaryDirectory(prefix=prefix) as folder:
    # The compilers read it when the first of them is loaded.
    os.environ['XLA_FLAGS'] = f'--xla_dump_to={folder} --xla_dump_hlo_as_text'
    while True:
      try:
        request = pickle.load(requests)
      except EOFError:
        return
      try:
        answer = False, _answer(pathlib.Path(folder), *request)
      except Exception as error:
        answer = True, f'{type(error).__name__}: {error}'
      pickle.dump(answer, answers)
      answers.flush()
