# SPDX-License-Identifier: Apache-2.0
"""A byte-level GPT in Flax NNX, trained with bfloat16 weights.

  python examples/train_gpt.py
  python examples/train_gpt.py --optimizer adamw_fp32 --text book.txt
  python examples/train_gpt.py --checkpoint /tmp/gpt --save-every 100

The text is the source of Python's own standard library, which every machine
has. Three optimizers start from the same float32 weights: `adamw_fp32` keeps
everything in float32, `adamw_plain_bf16` is Optax's AdamW on weights and
moments rounded to bfloat16, `adamw_bf16` is ours. With `--update in-backward`
the backward pass updates each block as soon as its gradient is there. Stop with
Ctrl-C whenever you like: with `--checkpoint`, the same command goes on from the
last finished step and reports the same losses as a run that was never stopped.
A checkpoint in which a bit has changed is refused, with the way out.

Read on: the model, the text, the optimizers, the step, checkpoints, the loop.
"""

import argparse
from collections.abc import Callable, Generator, Iterator
import contextlib
import dataclasses
import functools
import json
import pathlib
import signal
import sysconfig
import threading
import time
from typing import Any, NamedTuple

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from rich import progress

import checksums
import files
import optax_mp

MAX_NORM = 1.0
OPTIMIZERS = ('adamw_bf16', 'adamw_fp32', 'adamw_plain_bf16')


@dataclasses.dataclass(frozen=True)
class Config:
  """Every flag of the program; `--learning-rate` is `learning_rate`."""

  text: str = ''  # a file of one's own
  optimizer: str = 'adamw_bf16'
  residual_bits: int = 16
  update: str = 'fused'  # or separate, in-backward, see `compile_step`
  layers: int = 4
  width: int = 128
  heads: int = 4
  context: int = 64
  batch: int = 12
  steps: int = 800
  learning_rate: float = 1e-3
  warmup: int = 100
  b2: float = 0.99
  weight_decay: float = 0.1
  compute_dtype: str = ''  # float32 on CPUs, elsewhere bfloat16
  recompute: bool = False  # jax.checkpoint around each layer
  seed: int = 0
  validate_every: int = 100
  validation_batches: int = 32
  checkpoint: str = ''
  save_every: int = 100


class Record(NamedTuple):
  """What one step reports."""

  step: int  # finished steps
  loss: float
  validation: float | None  # where it was time to measure it
  seconds: float


class Block(nnx.Module):
  """Attention and a feed-forward layer, each added to what comes in."""

  def __init__(self, config: Config, dtype: jnp.dtype, rngs: nnx.Rngs):
    width, depth = config.width, 2 * config.layers

    def linear(fan_in, fan_out, std):
      init = nnx.initializers.normal(std)
      return nnx.Linear(
        fan_in, fan_out, kernel_init=init, dtype=dtype, rngs=rngs
      )

    # The residual stream adds up `depth` outputs: shrink each (GPT-2).
    self.heads = config.heads
    self.norm_1 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
    self.qkv = linear(width, 3 * width, 0.02)
    self.project = linear(width, width, 0.02 * depth**-0.5)
    self.norm_2 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
    self.widen = linear(width, 4 * width, 0.02)
    self.narrow = linear(4 * width, width, 0.02 * depth**-0.5)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (batch, context, width) to the same shape."""
    qkv = self.qkv(self.norm_1(x))
    qkv = qkv.reshape(*x.shape[:2], 3, self.heads, -1)
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x += self.project(mixed.reshape(x.shape))
    return x + self.narrow(jax.nn.gelu(self.widen(self.norm_2(x))))


class GPT(nnx.Module):
  """Embeddings, a stack of `layers` blocks, logits for the next byte."""

  def __init__(self, config: Config, rngs: nnx.Rngs):
    dtype = jnp.dtype(
      config.compute_dtype
      or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
    )
    small = nnx.initializers.normal(0.02)

    def embed(count):
      return nnx.Embed(
        count, config.width, embedding_init=small, dtype=dtype, rngs=rngs
      )

    @nnx.split_rngs(splits=config.layers)
    @nnx.vmap
    def stack(rngs):
      return Block(config, dtype, rngs)

    self.recompute = config.recompute
    self.bytes = embed(256)
    self.positions = embed(config.context)
    self.blocks = stack(rngs)
    self.norm = nnx.LayerNorm(config.width, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    tokens: jax.Array,
    run: Callable[[jax.Array], jax.Array] | None = None,
  ) -> jax.Array:
    """Maps tokens (batch, context) to float32 logits (..., 256).

    Args:
      tokens: bytes.
      run: runs the blocks, if they are not here.

    Returns:
      Logits of the next byte.
    """
    x = self.bytes(tokens) + self.positions(jnp.arange(tokens.shape[1]))
    x = (run or self.scan)(x)
    # The embedding's own matrix turns states back into bytes (GPT-2).
    to_bytes = self.bytes.embedding[...].astype(jnp.float32)
    return self.norm(x).astype(jnp.float32) @ to_bytes.T

  def scan(self, x: jax.Array) -> jax.Array:
    """Runs the blocks."""
    graphdef, stack = nnx.split(self.blocks)

    def layer(x, params):
      return nnx.merge(graphdef, params)(x), None

    if self.recompute:
      layer = jax.checkpoint(layer)
    return jax.lax.scan(layer, x, stack)[0]


def load_text(path: str = '') -> tuple[np.ndarray, np.ndarray]:
  """Reads bytes: the first 90 % to train on, the rest to validate."""
  library = pathlib.Path(sysconfig.get_paths()['stdlib'])
  files = [path] if path else sorted(library.glob('*.py'))
  data = b''.join(pathlib.Path(file).read_bytes() for file in files)
  text = np.frombuffer(data, np.uint8)
  cut = len(text) * 9 // 10
  return text[:cut], text[cut:]


def windows(text: np.ndarray, starts: np.ndarray, context: int) -> np.ndarray:
  """Cuts `context` inputs and, shifted by one, as many targets."""
  return text[starts[:, None] + np.arange(context + 1)].astype(np.int32)


def training_batch(text: np.ndarray, config: Config, step: int) -> np.ndarray:
  """Draws from (seed, step) alone, so that no iterator needs saving."""
  generator = np.random.default_rng((config.seed, step))
  starts = generator.integers(len(text) - config.context, size=config.batch)
  return windows(text, starts, config.context)


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
  """AdamW, as `scheduled` trains it."""
  adamw = optax.adamw
  if config.optimizer == 'adamw_bf16':
    adamw = functools.partial(
      optax_mp.adamw_bf16, residual_bits=config.residual_bits
    )
  return scheduled(
    config, adamw, b2=config.b2, weight_decay=config.weight_decay
  )


def scheduled(
  config: Config, make: Callable[..., Any], **others: Any
) -> optax.GradientTransformationExtraArgs:
  """Clipping, then `make` with a cosine schedule; only matrices decay."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.0,
    config.learning_rate,
    min(config.warmup, config.steps // 2),
    config.steps,
    end_value=0.1 * config.learning_rate,
  )
  if 'weight_decay' in others:
    others['mask'] = _decayed
  tx = make(schedule, **others)
  if config.update == 'in-backward':
    return tx  # which sees one layer at a time: `in_backward` clips
  # Clip first: nothing may follow a compensated optimizer.
  return optax.chain(optax.clip_by_global_norm(MAX_NORM), tx)


def _decayed(params: optax.Params) -> optax.Params:
  # By name, because the stack gives biases and norm scales two axes.
  def is_matrix(path, _):
    return path[-1].key in ('kernel', 'embedding')

  return jax.tree.map_with_path(is_matrix, params)


class State(NamedTuple):
  """What a step replaces."""

  params: chex.ArrayTree
  opt_state: optax.OptState


class Setup(NamedTuple):
  """All that `train` needs; the arrays themselves come from `create`."""

  create: Callable[..., State]  # of a seed; without one, of the config's
  shapes: State
  tx: optax.GradientTransformationExtraArgs
  step: Callable[[State, jax.typing.ArrayLike], tuple[State, jax.Array]]
  programs: dict[str, jax.stages.Compiled]
  validate: Callable[[chex.ArrayTree, np.ndarray], jax.Array]


def setup(
  config: Config,
  tx: optax.GradientTransformationExtraArgs | None = None,
  dtype: jax.typing.DTypeLike | None = None,
  compiler: Callable[..., Any] | None = None,
) -> Setup:
  """Builds model and optimizer and compiles the step, without weights.

  Args:
    config: all that is not given here.
    tx: another optimizer than the config's.
    dtype: of the parameters; by default what the config's optimizer is for.
    compiler: `compile_donated`, or another in its place.

  Returns:
    What `train` needs.
  """
  tx = tx or make_optimizer(config)
  low = config.optimizer != 'adamw_fp32'
  dtype = dtype or (jnp.bfloat16 if low else jnp.float32)

  loss_fn = loss_of(config)
  fused = None
  if config.update == 'in-backward':
    fused, tx = in_backward(config, tx)

  def new_model(seed=config.seed):
    return nnx.split(GPT(config, nnx.Rngs(seed)))

  def create(seed=config.seed):
    _, params = new_model(seed)
    params = jax.tree.map(lambda x: x.astype(dtype), nnx.to_pure_dict(params))
    return State(params, tx.init(params))

  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    jax.eval_shape(create),
  )
  compiler = compiler or compile_donated
  step, programs = compile_step(config, loss_fn, tx, shapes, compiler, fused)
  return Setup(create, shapes, tx, step, programs, jax.jit(loss_fn))


def loss_of(config: Config) -> Callable[..., jax.Array]:
  """The loss, `loss_fn(params, tokens)`."""
  graphdef, _ = nnx.eval_shape(lambda: nnx.split(GPT(config, nnx.Rngs(0))))

  def loss_fn(params, tokens):
    return cross_entropy(nnx.merge(graphdef, params)(tokens[:, :-1]), tokens)

  return loss_fn


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Nats per byte."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits, tokens[:, 1:]
  ).mean()


def in_backward(config, tx, **options):
  """The step whose backward pass updates the blocks, one after the other.

  Args:
    config: of the model.
    tx: the optimizer, without clipping.
    **options: of `backward.fused_step`, else clipping.

  Returns:
    `fused(params, opt_state, tokens)` and, for `init`, what `tx` is as a whole.
  """
  model = nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0)))
  blocks, _ = nnx.split(model.blocks)
  del model.blocks
  around, _ = nnx.split(model)

  def loss_fn(rest, run, tokens):
    logits = nnx.merge(around, rest)(tokens[:, :-1], run)
    return cross_entropy(logits, tokens)

  def block_fn(params, x):
    return nnx.merge(blocks, params)(x)

  options = options or {'max_norm': MAX_NORM}
  step = optax_mp.backward.fused_step(loss_fn, block_fn, tx, **options)

  def halves(params):
    rest = {name: part for name, part in params.items() if name != 'blocks'}
    return rest, params['blocks']

  def fused(params, opt_state, tokens):
    rest, stack, opt_state, loss = step(*halves(params), opt_state, tokens)
    return rest | {'blocks': stack}, opt_state, loss

  whole = optax.GradientTransformationExtraArgs(
    lambda params: step.init(*halves(params)), tx.update
  )
  return fused, whole


def compile_step(config, loss_fn, tx, shapes, compiler, other=None):
  """Compiles the step in a way that reuses all the memory it can.

  `fused`: one program, whose new params and state overwrite the old ones.
  `separate`: gradients in one program; in another the new params overwrite
  the gradients. On CPUs both give the same losses bit for bit.
  `in-backward`: one program, in which gradients are those of one block.

  Args:
    config: names the way.
    loss_fn: `loss_fn(params, tokens) -> scalar`.
    tx: the optimizer.
    shapes: of `params` and `opt_state`.
    compiler: `compile_donated`, or another in its place.
    other: the step `in-backward`.

  Returns:
    `step(state, tokens) -> (state, loss)` and the programs it runs, by name.
  """
  # Without shardings: with them, JAX 0.10 refuses int4 arrays on a CPU.
  params, opt_state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes
  )
  tokens = jax.ShapeDtypeStruct((config.batch, config.context + 1), jnp.int32)
  loss_and_gradients = jax.value_and_grad(loss_fn)

  # An output takes the first donated buffer of its shape and dtype: the new
  # params stand first among outputs, so what they replace stands first here.
  def update(gradients, opt_state, params):
    updates, opt_state = tx.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  def fused(params, opt_state, tokens):
    loss, gradients = loss_and_gradients(params, tokens)
    # A compiler may keep a gradient in more bits than its dtype has, which
    # `separate` cannot. One barrier per leaf: a single one would keep every
    # gradient until the last is there.
    gradients = jax.tree.map(jax.lax.optimization_barrier, gradients)
    return *update(gradients, opt_state, params), loss

  if config.update != 'separate':
    program = compiler(other or fused, (0, 1), params, opt_state, tokens)

    def step(state, tokens):
      params, opt_state, loss = program(*state, tokens)
      return State(params, opt_state), loss

    return step, {'step': program}
  first = compiler(loss_and_gradients, (), params, tokens)
  second = compiler(update, (0, 1), params, opt_state, params)

  def step(state, tokens):
    loss, gradients = first(state.params, tokens)
    return State(*second(gradients, state.opt_state, state.params)), loss

  return step, {'gradients': first, 'update': second}


def compile_donated(fn, donated, *args) -> jax.stages.Compiled:
  """Compiles ahead; raises where a donated buffer is not reused."""
  compiled = jax.jit(fn, donate_argnums=donated).lower(*args).compile()
  leaves = jax.tree.leaves([args[i] for i in donated])
  expected = sum(map(size_in_bytes, leaves))
  aliased = optax_mp.memory.report(compiled).alias_bytes
  if aliased != expected:
    # JAX itself is silent about this when compiling ahead.
    raise RuntimeError(
      f'`{fn.__name__}` donates {expected} bytes but reuses {aliased}.'
    )
  return compiled


def size_in_bytes(leaf: Any) -> int:
  """Bytes of an array; its `nbytes` counts an int4 as a whole one."""
  integer = jnp.issubdtype(leaf.dtype, jnp.integer)
  kind = jnp.iinfo if integer else jnp.finfo
  return -(-leaf.size * kind(leaf.dtype).bits // 8)


@contextlib.contextmanager
def interrupts_held() -> Iterator[threading.Event]:
  """Lets Ctrl-C wait for the end of a step or of a save.

  Half-way through a step the old state is overwritten and no new one there.

  Yields:
    An event that says whether Ctrl-C came; `deliver` hands it on.
  """
  asked = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield asked
    return
  handler = signal.signal(signal.SIGINT, lambda *_: asked.set())
  try:
    yield asked
  finally:
    signal.signal(signal.SIGINT, handler)


def deliver(asked: threading.Event) -> None:
  """Does now what Ctrl-C would have done."""
  if asked.is_set():
    signal.raise_signal(signal.SIGINT)


class Checkpoints:
  """Saves and restores params, optimizer state and step; off without path."""

  def __init__(self, config: Config):
    self.manager = None
    if config.checkpoint:
      # Not in the background: the next step overwrites what is being saved.
      options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=False
      )
      self.path = pathlib.Path(config.checkpoint).absolute()
      self.manager = ocp.CheckpointManager(self.path, options=options)
      self.check_same_run(self.path / 'config.json', config)

  def check_same_run(self, path: pathlib.Path, config: Config) -> None:
    """Refuses to go on with other settings: the losses would be others."""
    free = ('checkpoint', 'save_every', 'validate_every', 'validation_batches')
    now = {k: v for k, v in vars(config).items() if k not in free}
    if not path.exists():
      files.write_text(path, json.dumps(now))
    before = files.read_json(
      path, 'Remove it, and the run goes on with the flags that you give.'
    )
    changed = {
      k: (before.get(k), now[k]) for k in now if before.get(k) != now[k]
    }
    if changed:
      raise ValueError(
        f'`checkpoint` {config.checkpoint} is of another run; got (then, now) '
        f'{changed}. Use the same flags or another folder.'
      )

  def restore(self, built: Setup) -> tuple[State, int]:
    """Returns the latest state and its step, or a fresh one and 0."""
    if not self.manager or self.manager.latest_step() is None:
      return built.create(), 0
    # The template gives back NamedTuples and dtypes.
    template = {'state': built.shapes, 'step': 0}
    wanted = ocp.args.Composite(
      arrays=ocp.args.StandardRestore(template),
      checksums=ocp.args.JsonRestore(),
    )
    *before, last = sorted(self.manager.all_steps())
    try:
      restored = self.manager.restore(last, args=wanted)
      checksums.verify(restored['arrays'], restored['checksums'])
    except Exception as error:  # Orbax notices some damage, in its own words
      reason = str(error).partition('\n')[0]
      raise ValueError(
        f'`checkpoint` {self.path / str(last)} is damaged, or not of this '
        f'program: {reason:.300}. Move this folder away, and the same command '
        f'goes on from {f"step {before[-1]}" if before else "the beginning"}.'
      ) from error
    return restored['arrays']['state'], restored['arrays']['step']

  def save(self, state: State, step: int) -> None:
    """Saves, unless this step is there already."""
    if self.manager and self.manager.latest_step() != step:
      tree = {'state': state, 'step': step}
      items = ocp.args.Composite(
        arrays=ocp.args.StandardSave(tree),
        checksums=ocp.args.JsonSave(checksums.of(tree)),
      )
      self.manager.save(step, args=items)


def train(config: Config, built: Setup | None = None) -> Generator[Record]:
  """Trains and yields a `Record` after every step; stop it where you like."""
  built = built or setup(config)
  text, validation_text = load_text(config.text)
  starts = np.linspace(
    0,
    len(validation_text) - config.context - 1,
    config.validation_batches * config.batch,
    dtype=np.int64,
  )
  held_out = np.split(
    windows(validation_text, starts, config.context), config.validation_batches
  )
  checkpoints = Checkpoints(config)
  state, step = checkpoints.restore(built)
  try:
    while step < config.steps:
      tokens = training_batch(text, config, step)
      with interrupts_held() as asked:
        start = time.perf_counter()
        state, loss = built.step(state, tokens)
        step += 1
        loss = float(loss)
        seconds = time.perf_counter() - start
        validation = None
        if step % config.validate_every == 0 or step == config.steps:
          losses = [float(built.validate(state.params, x)) for x in held_out]
          validation = float(np.mean(losses))
        if step % config.save_every == 0:
          checkpoints.save(state, step)
        record = Record(step, loss, validation, seconds)
      try:
        yield record
      finally:  # a finished step is reported before Ctrl-C ends the run
        deliver(asked)
  finally:
    with interrupts_held() as asked:
      checkpoints.save(state, step)
    deliver(asked)


def parse_arguments() -> Config:
  """Makes a flag of every field of `Config`."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  choices = {
    'optimizer': OPTIMIZERS,
    'update': ('fused', 'separate', 'in-backward'),
    'compute_dtype': ('float32', 'bfloat16'),
    'residual_bits': (16, 8, 0),
  }
  for field in dataclasses.fields(Config):
    flag = '--' + field.name.replace('_', '-')
    if field.type is bool:
      parser.add_argument(flag, action='store_true')
    else:
      parser.add_argument(
        flag,
        type=field.type,
        default=field.default,
        choices=choices.get(field.name),
      )
  return Config(**vars(parser.parse_args()))


def main() -> None:
  """Trains with a progress bar."""
  config = parse_arguments()
  tokens = config.batch * config.context
  columns = (
    *progress.Progress.get_default_columns(),
    progress.TextColumn('loss {task.fields[loss]:.4f}'),
    progress.TextColumn('{task.fields[speed]:,.0f} tokens/s'),
  )
  with (
    contextlib.closing(train(config)) as records,
    progress.Progress(*columns) as bar,
  ):
    task = bar.add_task(config.optimizer, total=config.steps, loss=0, speed=0)
    for step, loss, validation, seconds in records:
      bar.update(task, completed=step, loss=loss, speed=tokens / seconds)
      if validation is not None:
        bar.print(f'step {step}: validation loss {validation:.4f}')


if __name__ == '__main__':
  with contextlib.suppress(KeyboardInterrupt):
    main()
