# SPDX-License-Identifier: Apache-2.0
"""Formats: how one array of floats is kept."""

from optax_mp.formats._affine import Affine as Affine
from optax_mp.formats._base import Format as Format
from optax_mp.formats._base import HighLow as HighLow
from optax_mp.formats._base import Stored as Stored
from optax_mp.formats._base import bits_per_value as bits_per_value
from optax_mp.formats._base import is_stored as is_stored
from optax_mp.formats._bfloat16 import BFloat16 as BFloat16
from optax_mp.formats._block_int import Block as Block
from optax_mp.formats._block_int import BlockInt as BlockInt
from optax_mp.formats._error_feedback import ErrorFeedback as ErrorFeedback
from optax_mp.formats._error_feedback import Feedback as Feedback
from optax_mp.formats._factored import Factored as Factored
from optax_mp.formats._factored import Factors as Factors
from optax_mp.formats._float8 import Float8 as Float8
from optax_mp.formats._float16 import Float16 as Float16
from optax_mp.formats._float16 import SplitFloat16 as SplitFloat16
from optax_mp.formats._rule import Rule as Rule
from optax_mp.formats._split import Split as Split
from optax_mp.formats._tree import decode_tree as decode_tree
from optax_mp.formats._tree import encode_tree as encode_tree

__all__ = (
  'Affine',
  'BFloat16',
  'Block',
  'BlockInt',
  'ErrorFeedback',
  'Factored',
  'Factors',
  'Feedback',
  'Float16',
  'Float8',
  'Format',
  'HighLow',
  'Rule',
  'Split',
  'SplitFloat16',
  'Stored',
  'bits_per_value',
  'decode_tree',
  'encode_tree',
  'is_stored',
)
