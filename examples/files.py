# SPDX-License-Identifier: Apache-2.0
"""JSON files that a program reads again: whole, or not there at all.

`write_text` is for every file that a later run depends on. A full disk, a kill
or a crash during the write leaves the old file as it was.
"""

import json
import os
import pathlib
from typing import Any


def write_text(path: pathlib.Path, text: str) -> None:
  """Replaces a file by a new one in a single step.

  Args:
    path: the file; its folder exists.
    text: all that it is to contain.

  Raises:
    OSError: if there is no room; `path` is then what it was before.
  """
  # In the same folder, because a rename across file systems is a copy. With
  # the process in its name, because two runs may write at the same time.
  new = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    with new.open('w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(new, path)
  finally:
    new.unlink(missing_ok=True)


def read_json(path: pathlib.Path, way_out: str) -> dict[str, Any]:
  """Reads a JSON object.

  Args:
    path: the file.
    way_out: a sentence that says what to do if the file is damaged.

  Returns:
    The object.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file holds anything else than a JSON object.
  """
  try:
    found = json.loads(path.read_bytes())
  except ValueError as error:  # neither UTF-8 nor JSON
    raise ValueError(f'`{path}` is damaged: {error}. {way_out}') from error
  if not isinstance(found, dict):
    raise ValueError(
      f'`{path}` is damaged: it holds {found!r:.40}, not an object. {way_out}'
    )
  return found
