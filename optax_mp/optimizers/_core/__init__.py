# SPDX-License-Identifier: Apache-2.0
"""Mathematics that several papers share; their files import nothing else."""
