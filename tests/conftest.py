# SPDX-License-Identifier: Apache-2.0
"""Every test runs on eight CPU devices; a warning is an error."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
