# SPDX-License-Identifier: Apache-2.0
"""What a parameter is for, by the names on its path."""

from collections.abc import Iterable
import re

# Whole names: 'lm_head' is a head, 'MultiHeadAttention_0' is none.
BIAS = re.compile(r'.*bias.*', re.IGNORECASE)
EMBEDDING = re.compile(r'.*embed.*|.*emb|.*token|wte|wpe', re.IGNORECASE)
GAIN = re.compile(r'scale', re.IGNORECASE)  # of a norm, in Flax
HEAD = re.compile(
  r'heads?|.*_head|lmhead|logits|.*classifier|unembed.*', re.IGNORECASE
)
NORM = re.compile(r'.*norm.*|ln.?|ln\d+|ln_.*|.*_ln', re.IGNORECASE)


def has(names: Iterable[str], *kinds: re.Pattern[str]) -> bool:
  """Whether one of the names on a path is of one of these kinds."""
  return any(kind.fullmatch(name) for name in names for kind in kinds)
