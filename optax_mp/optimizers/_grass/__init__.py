# SPDX-License-Identifier: Apache-2.0
"""Grass: training with structured sparse gradients (2406.17660).

The optimizer; its transformation of any other one; and how rows are chosen,
there and back.
"""
