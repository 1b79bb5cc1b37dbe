# SPDX-License-Identifier: Apache-2.0
"""What every part leans on; it imports nothing of ours."""
