# SPDX-License-Identifier: Apache-2.0
"""Adam-mini: Use Fewer Learning Rates To Gain More (2406.16793).

The optimizer, and a rule for its blocks.
"""
