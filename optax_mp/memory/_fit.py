# SPDX-License-Identifier: Apache-2.0
"""The deepest model that fits."""

from collections.abc import Callable

from optax_mp.memory import _report

# So many depths follow the line, then the interval is halved.
_LINE = 6


def most_layers(report: Callable[[int], _report.Report], first: int) -> int:
  """Searches for the deepest model that fits.

  Memory grows by the same for each layer, but for what the compiler does when
  it becomes scarce. So the search goes where a line through two reports says,
  and ends where one depth fits and the next does not.

  Args:
    report: compiles a model of so many layers.
    first: a number of layers to begin with.

  Returns:
    The most layers that fit, 0 if not even one does.
  """
  known: dict[int, _report.Report] = {}
  low, high, guess = 0, None, first
  while high is None or high - low > 1:
    known[guess] = report(guess)
    if known[guess].fits:
      low = guess
    else:
      high = guess
    guess = _next(known, low, high)
  return low


def _next(known: dict[int, _report.Report], low: int, high: int | None) -> int:
  """The depth to try next, between one that fits and one that does not."""
  capacity = next(iter(known.values())).capacity_bytes or 0
  # The line goes through the depths that come closest to the capacity.
  near = sorted(known, key=lambda n: abs(known[n].peak_bytes - capacity))
  n, peak = near[0], known[near[0]].peak_bytes
  slope = peak / n
  if len(near) > 1:
    slope = (peak - known[near[1]].peak_bytes) / (n - near[1])
  guess = int(n + (capacity - peak) / max(slope, 1e-9))
  if high is None:
    return min(max(guess, low + 1), 4 * low)
  if len(known) > _LINE:
    guess = (low + high) // 2
  return min(max(guess, low + 1), high - 1)
