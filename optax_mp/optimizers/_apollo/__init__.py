# SPDX-License-Identifier: Apache-2.0
"""APOLLO: SGD-like memory, AdamW-level performance (2412.05270).

The optimizer, and its smallest form.
"""
