# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits with Equinox, in bfloat16 with moments of 8 bits.

  pip install equinox
  python examples/equinox_mlp.py

Two lines differ from the usual Equinox loop: the arrays of the module are cast
to bfloat16 once, and a step ends with `optax.apply_updates` on the arrays alone
where the usual one has `eqx.apply_updates`. The latter adds without a cast, so
the float32 updates of the optimizer would make the parameters float32.
"""

from typing import Any

import equinox as eqx
import jax
import optax

import digits
import optax_mp

EPOCHS, BATCH, SEED = 10, 64, 0
STEPS = EPOCHS * (1437 // BATCH)

tx = optax_mp.adamw_8bit(
  optax.cosine_decay_schedule(3e-3, STEPS), weight_decay=0.01
)


def loss_fn(model, images, labels) -> jax.Array:
  """Float32 images make the layers compute in float32."""
  logits = jax.vmap(model)(images)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@eqx.filter_jit(donate='all-except-first')
def train_step(batch, model, opt_state):
  """Takes one step; donated, the old model makes room for the new one."""
  loss, gradients = eqx.filter_value_and_grad(loss_fn)(model, *batch)
  params, rest = eqx.partition(model, eqx.is_inexact_array)
  updates, opt_state = tx.update(gradients, opt_state, params)
  params = optax.apply_updates(params, updates)
  return eqx.combine(params, rest), opt_state, loss


def main() -> float:
  """Trains, prints what happens and returns the test accuracy."""
  data = digits.load(64)
  key = jax.random.key(SEED)
  model: Any = eqx.nn.MLP(64, 10, width_size=256, depth=2, key=key)
  model = optax_mp.cast(model)  # functions, integers and keys stay
  params = eqx.filter(model, eqx.is_inexact_array)
  opt_state = tx.init(params)
  print(optax_mp.memory.plan(tx, params))

  accuracy = 0.0
  for epoch in range(1, EPOCHS + 1):
    for batch in digits.batches(data, BATCH, seed=epoch):
      model, opt_state, loss = train_step(batch, model, opt_state)
    if epoch % 5 == 0:
      logits = jax.vmap(model)(data.test_images)
      accuracy = float((logits.argmax(-1) == data.test_labels).mean())
      print(f'epoch {epoch}: loss {loss:.4f}, test accuracy {accuracy:.4f}')
  return accuracy


if __name__ == '__main__':
  main()
