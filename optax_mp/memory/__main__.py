# SPDX-License-Identifier: Apache-2.0
"""Whether a GPT fits: `python -m optax_mp.memory --params 7e9 --target h100`.

Compiles one training step of a GPT with every recipe for a device that need not
be here, with the compiler of that device, and prints what each needs.
"""

import argparse
from concurrent import futures
import dataclasses
import functools
import inspect
import os
import sys

import jax
import jax.numpy as jnp
import optax

import optax_mp
from optax_mp import backward
from optax_mp.memory import _fit
from optax_mp.memory import _report
from optax_mp.memory import _show
from optax_mp.memory import _survey
from optax_mp.memory import _targets
from optax_mp.memory import gpt

_GPU = (
  "JAX takes 75 % of a GPU's memory, unless the environment variable "
  'XLA_PYTHON_CLIENT_MEM_FRACTION gives it more; the driver takes some, too.'
)

_ALSO_IN_BACKWARD = ('optax.adamw, bfloat16', 'adamw_bf16', 'adamw_8bit')


def recipes(residual_bits: int | None = None) -> list[_survey.Recipe]:
  """AdamW as Optax has it, in two dtypes, and every recipe of ours.

  A recipe is what the package exports, takes a `learning_rate` and is no
  optimizer of a paper, which :func:`papers` has. Some are also there with the
  update in the backward pass.

  Args:
    residual_bits: for the recipes that have it; None for their own defaults.

  Returns:
    One of each.
  """
  found = [
    _survey.Recipe('optax.adamw, float32', optax.adamw(1e-4), jnp.float32),
    _survey.Recipe('optax.adamw, bfloat16', optax.adamw(1e-4), jnp.bfloat16),
  ]
  for name in optax_mp.__all__:
    make = getattr(optax_mp, name)
    if not inspect.isfunction(make) or hasattr(optax_mp.optimizers, name):
      continue
    parameters = inspect.signature(make).parameters
    if 'learning_rate' in parameters:
      options = {}
      if residual_bits is not None and 'residual_bits' in parameters:
        options = {'residual_bits': residual_bits}
      found.append(_survey.Recipe(name, make(1e-4, **options), jnp.bfloat16))
  for i in range(len(found), 0, -1):
    if found[i - 1].name in _ALSO_IN_BACKWARD:
      found.insert(i, in_backward(found[i - 1]))
  return found


def papers() -> list[_survey.Recipe]:
  """Papers' optimizers in float32, for `--only`: a row each would take long.

  Those that need more than a learning rate are left out.
  """
  found = []
  for name in optax_mp.optimizers.__all__:
    make = getattr(optax_mp.optimizers, name)
    if not inspect.isfunction(make) or not hasattr(optax_mp, name):
      continue
    first, *others = inspect.signature(make).parameters.values()
    if first.name == 'learning_rate' and all(
      p.default is not p.empty for p in others
    ):
      found.append(_survey.Recipe(name, make(1e-4), jnp.float32))
  return found


def in_backward(recipe: _survey.Recipe) -> _survey.Recipe:
  """The recipe, layers being updated as soon as their gradient is there."""

  def fused(axis):
    return backward.fused_step(
      functools.partial(gpt.loss_around, axis=axis),
      functools.partial(gpt.block, axis=axis),
      recipe.tx,
    )

  name = f'{recipe.name}, in backward'
  return dataclasses.replace(recipe, name=name, in_backward=fused)


def size_of(arguments: argparse.Namespace) -> gpt.Size:
  """The model that the flags describe.

  From a number of parameters alone it has GPT-3's proportions, 128 of width for
  each layer.

  Args:
    arguments: of `parse`.

  Returns:
    The model's size.

  Raises:
    ValueError: if the flags leave it open, or contradict each other.
  """
  params, layers, width = arguments.params, arguments.layers, arguments.width
  for name, value in (('params', params), ('devices', arguments.devices)):
    if value is not None and not 1 <= value < 1e15:
      raise ValueError(f'`--{name}` must be positive; got {value}.')
  make = functools.partial(
    gpt.Size,
    vocabulary=arguments.vocabulary,
    context=arguments.context,
    batch=arguments.batch,
  )
  if params is None:
    if layers is None or width is None:
      raise ValueError(
        '`--params`, or `--layers` and `--width`, must be given; got '
        f'`--layers` {layers} and `--width` {width}.'
      )
    return make(layers, width)
  embeddings = arguments.vocabulary + arguments.context

  def total(width: int, layers: int) -> int:
    return 12 * layers * width**2 + embeddings * width

  if width is None:
    width = min(
      range(64, 2**16, 64),
      key=lambda w: abs(total(w, layers or max(1, round(w / 128))) - params),
    )
  if layers is None:
    layers = max(1, round((params - embeddings * width) / (12 * width**2)))
  size = make(layers, width)
  if not 0.75 < size.num_params / params < 1.33:
    raise ValueError(
      f'`--params` must agree with the other flags; got {params:.3g}, and '
      f'{layers} layers of width {width} with a vocabulary of '
      f'{size.vocabulary} have {size.num_params:.3g}. Change one of them.'
    )
  return size


def measure(
  recipe: _survey.Recipe, size: gpt.Size, arguments: argparse.Namespace
) -> _show.Row:
  """Compiles one recipe, and where asked for searches what fits."""

  @functools.cache
  def report(layers: int) -> _report.Report:
    model = dataclasses.replace(size, layers=layers)
    target, devices = arguments.target, arguments.devices
    return _survey.compile_step(recipe, model, target, devices)

  here = report(size.layers)
  most = _fit.most_layers(report, size.layers) if arguments.fit else None
  print(f'compiled {recipe.name}', file=sys.stderr)
  return _show.Row(recipe.name, recipe.bytes_per_param(size), here, most)


def parse(argv: list[str] | None) -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(
    prog='python -m optax_mp.memory', description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  add = parser.add_argument
  add('--params', type=float, help='parameters, such as 7e9')
  add('--layers', type=int)
  add('--width', type=int)
  add('--vocabulary', type=int, default=50304)
  add('--context', type=int, default=1024)
  add('--batch', type=int, default=1, help='sequences a step of each device')
  add('--optimizer', help='the one to tell more about')
  add('--residual-bits', type=int, choices=(16, 8, 0))
  add('--only', action='append', help="one, or a paper's optimizer: no others")
  add('--target', default='h100', choices=_targets.TARGETS)
  add('--devices', type=int, default=1, help='of one slice or node, FSDP')
  add('--fit', action='store_true', help='search for the most layers that fit')
  add('--plot', metavar='FILE', help='draw the table, as .png, .svg, .pdf')
  return parser.parse_args(argv)


def _check_name(flag: str, name: str, names: list[str]) -> None:
  if name not in names:
    raise ValueError(f'`--{flag}` must be one of {names}; got {name!r}.')


def only(
  wanted: list[str], known: list[_survey.Recipe]
) -> list[_survey.Recipe]:
  """Those with these names; a ValueError if there is none of a name."""
  names = [recipe.name for recipe in known]
  for name in wanted:
    _check_name('only', name, names)
  return [recipe for recipe in known if recipe.name in wanted]


def main(argv: list[str] | None = None) -> None:
  """Prints the table, and the whole report of one recipe."""
  arguments = parse(argv)
  # Steps are only traced here: no reason to take this machine's accelerator.
  jax.config.update('jax_platforms', 'cpu')
  if arguments.target == 'cpu':
    jax.config.update('jax_num_cpu_devices', arguments.devices)
  if arguments.plot:
    _show.check(arguments.plot)
  size = size_of(arguments)
  found = recipes(arguments.residual_bits)
  if arguments.only:
    found = only(arguments.only, found + papers())
  names = [recipe.name for recipe in found]
  if arguments.optimizer is None:
    arguments.optimizer = 'adamw_8bit' if 'adamw_8bit' in names else names[0]
  _check_name('optimizer', arguments.optimizer, names)
  # The compilers run beside this process: as many at once as there are cores.
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    rows = list(pool.map(lambda r: measure(r, size, arguments), found))
  chosen = rows[names.index(arguments.optimizer)]
  title = (
    f'A GPT of {size.num_params / 1e9:.2f} B parameters: {size.layers} layers '
    f'of width {size.width}, context {size.context}, batch {size.batch}, on '
    f'{arguments.devices} x {chosen.report.device}'
  )
  print(title, _show.table(rows, size), sep='\n\n')
  target = _targets.find(arguments.target)
  for note in (_GPU if target.platform == 'cuda' else '', target.note):
    print(f'\n{note}' if note else '', end='\n' if note else '')
  print(f'\n{chosen.name}', chosen.report, sep='\n\n')
  if arguments.plot:
    _show.plot(rows, title, arguments.plot)


if __name__ == '__main__':
  try:
    main()
  except (ValueError, RuntimeError) as error:
    sys.exit(f'error: {error}')
