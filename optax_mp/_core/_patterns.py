# SPDX-License-Identifier: Apache-2.0
"""Regular expressions that select parameters by their paths."""

import re
from typing import Any


def compiled(keep_float32: Any) -> re.Pattern[str] | None:
  """The compiled pattern, or None for None; a ValueError if it is invalid."""
  if keep_float32 is None:
    return None
  try:
    if isinstance(keep_float32, (str, re.Pattern)):
      return re.compile(keep_float32)
    reason = f'a {type(keep_float32).__name__}'
  except re.error as error:
    reason = str(error)
  raise ValueError(
    '`keep_float32` must be a regular expression for paths of parameters, such '
    f"as 'embed'; got {keep_float32!r} ({reason})."
  )
