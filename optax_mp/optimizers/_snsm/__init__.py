# SPDX-License-Identifier: Apache-2.0
"""Subset-Norm and Subspace-Momentum (2411.07120), one paper in four files.

Two transformations, one for the second moment and one for the first, and what
the paper makes of them: optimizers in the manner of Adam, and others.
"""
