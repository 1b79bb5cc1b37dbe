# SPDX-License-Identifier: Apache-2.0
"""Whether the compiler of a platform is installed, and how to install it."""

from importlib import metadata

# As the extras `tpu` and `gpu` have them; flatbuffers is for `jax.export`.
_PACKAGES = {
  'tpu': ('libtpu', 'flatbuffers'),
  'cuda': ('jax-cuda12-plugin', 'jax-cuda12-pjrt', 'flatbuffers'),
}


def missing(platform: str) -> str:
  """Says what is missing to compile for a platform.

  Args:
    platform: 'tpu', 'cuda' or 'cpu'.

  Returns:
    What is wrong and the command that mends it; '' if nothing is missing.
  """
  wanted = _version('jaxlib')
  for package in _PACKAGES.get(platform, ()):
    version = _version(package)
    if version is None:
      return f'{package} is not installed. Run: {command(platform)}'
    if package.startswith('jax') and version != wanted:
      # JAX itself refuses such a plugin.
      return (
        f'{package} is of version {version}, jaxlib of {wanted}. '
        f'Run: {command(platform)}'
      )
  return ''


def command(platform: str) -> str:
  """The command that installs what fits to the installed jaxlib.

  Args:
    platform: 'tpu' or 'cuda'.

  Returns:
    A shell command.
  """
  packages = [
    f"'{package}=={_version('jaxlib')}'" if package.startswith('jax')
    else f"'{_libtpu()}'" if package == 'libtpu' else package
    for package in _PACKAGES[platform]
  ]  # fmt: skip
  return f'pip install {" ".join(packages)}'


def _libtpu() -> str:
  """The libtpu that the installed JAX asks for."""
  asked = metadata.requires('jax') or ()
  found = [r.partition(';')[0].strip() for r in asked if r.startswith('libtpu')]
  return found[0] if found else 'libtpu'


def _version(package: str) -> str | None:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return None
