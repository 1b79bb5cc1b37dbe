# SPDX-License-Identifier: Apache-2.0
"""How well stored moments follow those of float32, on one stream of gradients.

  python benchmarks/tracking.py [--steps 1000]

AdamW in float32 trains the GPT of `examples/train_gpt.py`. Beside it, each
format keeps its own moments of three tensors: decoded, averaged with the same
gradients and stored again in every step. Compared with float32 at the end, for
each pair of formats:

  update  relative RMS error of the last update, as the optimizer applies it:
          from moments that the last gradient is part of, before they are stored
  stored  the same, of the moments that are stored after it
  drift   the same, of the sum of all updates: noise averages out, bias adds up
  gain    projection of the sum of all updates on the exact one
  nu      median relative error, and bias in octaves, of the second moment

Twice: with b2=0.999, and for half as many steps with b2=0.95. Below the pairs
that optimizers ship stand variants, mostly of one moment, the other one in
float32. A few minutes on two cores of a CPU.
"""

import argparse
from collections.abc import Mapping
import dataclasses
import functools
import itertools
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib import figure
import optax
from rich import progress

from optax_mp import formats
from published import OURS
from published import PUBLISHED
from published import Pair
from published import bytes_per_parameter
import results

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'examples'))

import train_gpt

CONFIG = train_gpt.Config(
  layers=2, batch=4, steps=1000, learning_rate=2e-3, compute_dtype='float32'
)
DECAYS = (0.999, 0.95)  # b2, of the first and the second run
PAIRS = PUBLISHED | OURS
B1 = 0.9
EPS = 1e-8
_USED = (
  'layers',
  'width',
  'heads',
  'context',
  'batch',
  'learning_rate',
  'warmup',
  'weight_decay',
  'seed',
)
_SHOWN = ('update', 'stored', 'drift', 'gain', 'nu', 'nu bias')
# What is no percentage.
_OCTAVES = 'nu bias'


_ROUNDINGS = ('nearest', 'stochastic')
_ALONE = {
  'mu': ['8 sqrt 128']
  + [
    f'4 {name} {size}'
    for name in ('softsign', 'sqrt', 'dynamic', 'linear')
    for size in (128, 32)
  ],
  'nu': [
    '8 log 128',
    '8 log 32',
    '8 sqrt 128',
    '4 log 128',
    '4 log 32',
    '4 sqrt 128',
  ],
}
_TOGETHER = (
  ('8 sqrt 128 stochastic', '8 log 128 stochastic'),
  ('8 sqrt 128 nearest', '4 log 128 stochastic'),
  ('4 softsign 128 nearest', '8 log 128 stochastic'),
  ('4 softsign 128 nearest', '4 log 128 stochastic'),
  ('4 softsign 32 nearest', '4 log 128 stochastic'),
  ('4 softsign 32 stochastic', '4 log 128 stochastic'),
  ('4 softsign 32 nearest', '4 log 32 stochastic'),
  ('4 softsign 32 stochastic', '4 log 32 stochastic'),
)


def _variant(mu: str = '', nu: str = '') -> dict[str, Pair]:
  """A pair, by its name; a moment without one is in float32."""
  pair: dict[str, Any] = {}
  for field, text in (('mu', mu), ('nu', nu)):
    pair[field] = None
    if text:
      bits, name, size, rounding = text.split()
      settings: Any = {'map': name, 'rounding': rounding}
      pair[field] = formats.BlockInt(
        int(bits),  # type: ignore[arg-type]
        signed=field == 'mu',
        block_size=int(size),
        **settings,
      )
  named = {'mu': mu, 'nu': nu}
  return {', '.join(f'{k} {v}' for k, v in named.items() if v): pair}


def _variants() -> dict[str, Pair]:
  """What could be a default: one moment alone, then pairs."""
  variants = {}
  for field, names in _ALONE.items():
    for name, rounding in itertools.product(names, _ROUNDINGS):
      variants |= _variant(**{field: f'{name} {rounding}'})
  for mu, nu in _TOGETHER:
    variants |= _variant(mu, nu)
  return variants


VARIANTS = _variants()


TENSORS = ('embedding', 'MLP in', 'QKV')


def watched(tree: Any) -> dict[str, jax.Array]:
  """The three tensors: an embedding, and two kernels of the first layer."""
  blocks = tree['blocks']
  found = (
    tree['bytes']['embedding'],
    blocks['widen']['kernel'][0],
    blocks['qkv']['kernel'][0],
  )
  return dict(zip(TENSORS, found, strict=True))


class Shadows(NamedTuple):
  """Moments of the watched tensors, and what their updates add up to."""

  moments: dict[str, list[Any]]  # as `Tracker.formats` store them
  sums: dict[str, Any]  # of updates, of each pair
  last: dict[str, Any]  # update of each pair


class Tracker:
  """Keeps the moments of pairs of formats; `EXACT` is one of them."""

  EXACT = 'float32'

  def __init__(self, pairs: Mapping[str, Pair], b2: float, seed: int = 0):
    exact: Pair = {'mu': None, 'nu': None}
    self.pairs = {self.EXACT: exact, **pairs}
    self.decays = {'mu': B1, 'nu': b2}
    self.seed = seed
    # A format that many pairs share is kept once.
    self.formats = {
      field: list(dict.fromkeys(pair[field] for pair in self.pairs.values()))
      for field in self.decays
    }

  def init(self, like: Any) -> Shadows:
    """All moments are 0."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
    key = jax.random.key(self.seed)
    moments = {
      field: [_encode(format, zeros, key) for format in chosen]
      for field, chosen in self.formats.items()
    }
    sums = {name: zeros for name in self.pairs}
    return Shadows(moments, sums, sums)

  def advance(self, shadows: Shadows, gradients: Any, count: Any) -> Shadows:
    """One step; `count` is how many there are with it."""
    moments, seen = {}, {}
    for power, (field, decay) in enumerate(self.decays.items(), 1):
      moments[field], seen[field] = [], []
      for i, format in enumerate(self.formats[field]):
        old = _decode(format, shadows.moments[field][i], gradients)
        new = jax.tree.map(
          lambda x, g, d=decay, p=power: d * x + (1 - d) * g**p, old, gradients
        )
        seen[field].append(new)
        moments[field].append(_encode(format, new, self._key(count)))
    last = {name: self._update(name, seen, count) for name in self.pairs}
    sums = jax.tree.map(jnp.add, shadows.sums, last)
    return Shadows(moments, sums, last)

  def _key(self, count: Any) -> jax.Array:
    """As the wrappers draw noise: a word of a seed and one of the step."""
    words = jnp.array([self.seed, 0], jnp.uint32)
    return words.at[1].set(jnp.asarray(count, jnp.uint32))

  def report(self, shadows: Shadows, like: Any, count: int) -> dict[str, Any]:
    """Errors of each pair and tensor."""
    seen = {
      field: [
        _decode(format, stored, like)
        for format, stored in zip(chosen, shadows.moments[field], strict=True)
      ]
      for field, chosen in self.formats.items()
    }
    stored = {name: self._update(name, seen, count) for name in self.pairs}
    eps = functools.partial(self._update, seen=seen, count=count, eps=1e-12)
    told = {}
    for name in self.pairs:
      if name == self.EXACT:
        continue
      told[name] = {}
      for tensor in like:
        last = _both(shadows.last, name, tensor)
        total = _both(shadows.sums, name, tensor)
        nu = [self._moment('nu', x, seen)[tensor] for x in (name, self.EXACT)]
        told[name][tensor] = {
          'update': relative_error(*last),
          'cosine': cosine(*last),
          'stored': relative_error(*_both(stored, name, tensor)),
          'stored, eps 1e-12': relative_error(
            eps(name)[tensor], eps(self.EXACT)[tensor]
          ),
          'drift': relative_error(*total),
          'gain': gain(*total),
          **second_moment_errors(*nu),
        }
    return told

  def _moment(self, field: str, name: str, moments: dict[str, Any]) -> Any:
    return moments[field][self.formats[field].index(self.pairs[name][field])]

  def _update(
    self, name: str, seen: dict[str, Any], count: Any, eps: float = EPS
  ) -> Any:
    """Adam's update, without learning rate and weight decay."""
    mu, nu = (
      optax.tree.bias_correction(self._moment(field, name, seen), decay, count)
      for field, decay in self.decays.items()
    )
    return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)


def relative_error(x: jax.Array, exact: jax.Array) -> jax.Array:
  """RMS of the difference, in units of the exact one's."""
  return jnp.linalg.norm(x - exact) / jnp.linalg.norm(exact)


def cosine(x: jax.Array, exact: jax.Array) -> jax.Array:
  """1 where both have one direction."""
  return jnp.vdot(x, exact) / (jnp.linalg.norm(x) * jnp.linalg.norm(exact))


def gain(x: jax.Array, exact: jax.Array) -> jax.Array:
  """How much of the exact one there is: 1 without bias, or less, or more."""
  return jnp.vdot(x, exact) / jnp.vdot(exact, exact)


def second_moment_errors(
  nu: jax.Array, exact: jax.Array
) -> dict[str, jax.Array]:
  """Of values that are not zero; the bias of those that did not become it."""
  there, kept = exact > 0, (exact > 0) & (nu > 0)
  ratio = jnp.where(there, nu / exact, jnp.nan)
  octaves = jnp.where(kept, jnp.log2(jnp.where(kept, ratio, 1)), 0)
  return {
    'nu': jnp.nanmedian(jnp.abs(ratio - 1)),
    'nu bias': jnp.sum(octaves) / jnp.sum(kept),
    'nu zeroed': 1 - jnp.sum(kept) / jnp.sum(there),
  }


def _both(trees: Mapping[str, Any], name: str, tensor: str) -> Any:
  return trees[name][tensor], trees[Tracker.EXACT][tensor]


def _encode(format: Any, tree: Any, key: Any) -> Any:
  return tree if format is None else formats.encode_tree(tree, format, key)


def _decode(format: Any, stored: Any, like: Any) -> Any:
  return stored if format is None else formats.decode_tree(stored, like, format)


def track(
  config: train_gpt.Config, pairs: Mapping[str, Pair], advanced=lambda: None
) -> dict[str, Any]:
  """Trains once, with the config's b2.

  Args:
    config: of the model, which is trained in float32.
    pairs: of formats, by name.
    advanced: called after each step.

  Returns:
    The last loss, and the errors by pair and tensor.
  """
  adamw = functools.partial(optax.adamw, b1=B1, eps=EPS)
  tx = train_gpt.scheduled(
    config, adamw, b2=config.b2, weight_decay=config.weight_decay
  )
  built = train_gpt.setup(
    config, tx, jnp.float32, compiler=lambda step, *_: step
  )
  loss_and_gradients = jax.value_and_grad(built.validate)
  clip = optax.clip_by_global_norm(1.0)

  @functools.partial(jax.jit, donate_argnums=0)
  def train(state, tokens):
    loss, gradients = loss_and_gradients(state.params, tokens)
    updates, opt_state = tx.update(gradients, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    # What `scheduled` clips to, again: AdamW sees no other gradients.
    clipped, _ = clip.update(gradients, clip.init(params))
    return train_gpt.State(params, opt_state), loss, watched(clipped)

  tracker = Tracker(pairs, config.b2, config.seed)
  advance = jax.jit(tracker.advance)
  like = jax.eval_shape(watched, built.shapes.params)
  state, shadows = built.create(), tracker.init(like)
  text, _ = train_gpt.load_text(config.text)
  loss = jnp.nan
  for step in range(config.steps):
    tokens = train_gpt.training_batch(text, config, step)
    state, loss, gradients = train(state, tokens)
    shadows = advance(shadows, gradients, step + 1)
    advanced()
  report = jax.jit(lambda shadows: tracker.report(shadows, like, config.steps))
  numbers = jax.tree.map(lambda x: float(f'{x:.4g}'), report(shadows))
  # Compiled functions sort names.
  told = {name: {k: numbers[name][k] for k in TENSORS} for name in pairs}
  return {'steps': config.steps, 'loss': float(loss), 'pairs': told}


def draw(result: dict[str, Any]) -> figure.Figure:
  """Errors of updates, a marker a tensor."""
  names = list(result['bytes'])
  drawn = figure.Figure(
    figsize=(9, 1.4 + 0.3 * len(names)), layout='constrained'
  )
  panels = drawn.subplots(1, len(result['runs']), sharey=True, squeeze=False)
  for axes, (b2, run) in zip(panels[0], result['runs'].items(), strict=True):
    for marker, tensor in zip('os^', result['tensors'], strict=True):
      errors = [run['pairs'][name][tensor]['update'] for name in names]
      axes.plot(errors, names, marker, label=tensor, alpha=0.7)
    axes.set(xscale='log', title=f'b2={b2}, {run["steps"]} steps')
    axes.grid(axis='x', linewidth=0.3)
  panels[0][0].invert_yaxis()
  panels[0][0].legend()
  drawn.supxlabel('relative RMS error of the update, against float32 moments')
  return drawn


def table(result: dict[str, Any], b2: str) -> str:
  """A line a pair; a number a tensor, percentages but for octaves."""
  run = result['runs'][b2]
  columns = ''.join(f'{name:>26}' for name in _SHOWN)
  lines = [f'b2={b2}', f'{"":51}{"bytes":>6}{columns}']
  for name, tensors in run['pairs'].items():
    size = result['bytes'].get(name)
    line = f'{name:51}' + (f'{size:6.2f}' if size else ' ' * 6)
    for shown in _SHOWN:
      numbers = [row[shown] for row in tensors.values()]
      octaves = shown == _OCTAVES
      texts = [f'{x:+.2f}' if octaves else _percent(x) for x in numbers]
      line += f'{" / ".join(texts):>26}'
    lines.append(line)
  return '\n'.join(lines)


def _percent(x: float) -> str:
  return f'{100 * x:.3g}' if abs(x) < 10 else f'{100 * x:.0e}'


def parse_arguments() -> argparse.Namespace:
  """Reads the flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--steps', type=int, default=CONFIG.steps)
  parser.add_argument('--out', type=pathlib.Path, default=results.FOLDER)
  arguments = parser.parse_args()
  if arguments.steps < 2:
    parser.error('`--steps` must be 2 or more: the second run takes half.')
  return arguments


def main() -> None:
  """Trains with each decay."""
  arguments = parse_arguments()
  result = {
    'config': {name: getattr(CONFIG, name) for name in _USED},
    'eps': EPS,
    'tensors': list(TENSORS),
    'bytes': {name: bytes_per_parameter(x) for name, x in PAIRS.items()},
    'runs': {},
  }
  steps = arguments.steps, arguments.steps // 2
  with progress.Progress() as bar:
    task = bar.add_task('', total=sum(steps))
    for b2, count in zip(DECAYS, steps, strict=True):
      bar.update(task, description=f'b2={b2}')
      config = dataclasses.replace(CONFIG, b2=b2, steps=count)
      advanced = functools.partial(bar.advance, task)
      run = track(config, PAIRS | VARIANTS, advanced)
      result['runs'][str(b2)] = run
  results.save('tracking', result, draw(result), arguments.out)
  for b2 in result['runs']:
    print(table(result, b2), end='\n\n')


if __name__ == '__main__':
  main()
