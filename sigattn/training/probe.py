"""A linear probe: how well a linear classifier does on frozen features."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from sigattn import tasks
from sigattn.training import evaluate, setup

L2 = 1e-4  # the factor on half the squared norm of the weights
MOST_STEPS = 300  # of L-BFGS


def linear_probe(
  config: ConfigDict,
  params: Any,
  split: str,
  devices: jax.sharding.Mesh,
) -> dict[str, float]:
  """Accuracies of a logistic regression on the features of a run.

  It is trained on the whole training split, without augmentation, and
  evaluated on `split`: {"accuracy", "train_accuracy"}. Raises ValueError for a
  task without `represent`.
  """
  represent = evaluate.represent(config, devices)
  train, test = (
    represent(params, tasks.eval_batches(config, name))
    for name in (config.data.train_split, split)
  )
  scores = _fit_and_score(train, test, config.data.num_classes)
  return {name: float(x) for name, x in jax.device_get(scores).items()}


def random_encoder(
  config: ConfigDict, split: str, devices: jax.sharding.Mesh
) -> dict[str, float]:
  """`linear_probe` of the run's initial, untrained parameters."""
  _, params = setup.init(config, devices)
  return linear_probe(config, params, split, devices)


@functools.partial(jax.jit, static_argnums=2)
def _fit_and_score(train, test, num_classes):
  """Minimises the mean cross-entropy by L-BFGS.

  train, test: results of evaluate.represent. All features are first
  standardised by the mean and variance of those of `train`.
  """
  weight_M, feature_MD = train["weight"], train["feature"]
  mean_D = jnp.average(feature_MD, axis=0, weights=weight_M)
  variance_D = jnp.average(
    (feature_MD - mean_D[None]) ** 2, axis=0, weights=weight_M
  )

  def logits(model, data):
    x_MD = data["feature"] - mean_D[None]
    x_MD /= jnp.sqrt(variance_D + 1e-6)[None]
    # The line search needs an exact product.
    return jnp.dot(x_MD, model["kernel"], precision="highest") + model["bias"]

  def loss(model):
    nats_M = optax.softmax_cross_entropy_with_integer_labels(
      logits(model, train), train["target"]
    )
    size = optax.tree.norm(model["kernel"], squared=True)
    return jnp.average(nats_M, weights=weight_M) + L2 / 2 * size

  def accuracy(model, data):
    is_right_M = logits(model, data).argmax(-1) == data["target"]
    return jnp.average(is_right_M, weights=data["weight"])

  shape = feature_MD.shape[1], num_classes
  model = {"kernel": jnp.zeros(shape), "bias": jnp.zeros((1, num_classes))}
  model = _minimize(loss, model)
  return {
    "accuracy": accuracy(model, test),
    "train_accuracy": accuracy(model, train),
  }


def _minimize(loss, params):
  tx = optax.lbfgs()
  value_and_grad = optax.value_and_grad_from_state(loss)

  def step(carry):
    params, state = carry
    value, grads = value_and_grad(params, state=state)
    updates, state = tx.update(
      grads, state, params, value=value, grad=grads, value_fn=loss
    )
    return optax.apply_updates(params, updates), state

  def goes_on(carry):
    count = optax.tree.get(carry[1], "count")
    grad_norm = optax.tree.norm(optax.tree.get(carry[1], "grad"))
    return (count == 0) | ((count < MOST_STEPS) & (grad_norm > 1e-4))

  return jax.lax.while_loop(goes_on, step, (params, tx.init(params)))[0]
