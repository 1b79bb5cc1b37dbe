# SPDX-License-Identifier: Apache-2.0
"""MicroAdam: low space overhead and provable convergence (2405.15593).

The optimizer; its step, on blocks of a leaf; moments of a window of sparse
gradients; and blocks a few at a time.
"""
