# SPDX-License-Identifier: Apache-2.0
"""Helpers for all parts of the package; they import no other part."""
