"""Takes parameters from another run of ours, which config.init_from names.

From a run of the same task all parameters are taken, except a head for other
classes. From a run of another task the encoder is taken, if both tasks have the
same ENCODER; the other parameters keep their initial values. A learned table of
positions is resized if the numbers of patches differ.
"""

import math
import shlex
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from sigattn import tasks
from sigattn.pretrained import flatten, nested
from sigattn.validate import value_at

# Fields that change the model, although the run may have all parameters that
# ours needs, in the same shapes.
_SAME = ("model.mlp", "model.norm", "model.positions", "attn.forget_gate")
# Fields that change what the same parameters compute.
_FUNCTION = (
  "model.rope_base", "model.rope_share", "model.logit_cap",
  "model.norm_epsilon",
)  # fmt: skip
# Fields that decide which parameters there are, and in which shapes.
_SHAPES = (
  "model.width", "model.depth", "model.num_heads", "model.mlp_dim",
  "model.patch_size", "model.pool", "model.use_bias", "model.tied",
  "model.norm_kind", "model.parallel", "model.layer_scale", "data.channels",
  "data.vocab_size", "attn.num_kv_heads", "attn.qk_norm",
  "attn.learn_logit_bias",
)  # fmt: skip


def names(
  config: ConfigDict, params: Any, their_config: ConfigDict, theirs: Any
) -> set[str]:
  """The paths of the parameters that are taken, "embed/kernel" and so on.

  params, theirs: the parameters of both configs, or their shapes. Raises
  ValueError for a run whose parameters do not fit; the message has the flags
  that make them fit.
  """
  where = f"config.init_from={config.init_from!r}"
  encoder = getattr(tasks.get(config.task), "ENCODER", None)
  if config.task != their_config.task and encoder != getattr(
    tasks.get(their_config.task), "ENCODER", ()
  ):
    raise ValueError(
      f"{where}; is a run of the task {their_config.task!r}, from which "
      f"config.task={config.task!r} cannot start"
    )
  flags = _differing(config, their_config, (*_SAME, *_SHAPES))
  if any(path in flags for path in _SAME):
    raise _needs_flags(config, flags, their_config)
  ours, theirs = flatten(params), flatten(theirs)
  taken = set()
  for path, x in ours.items():
    top = path.split("/")[0]
    their = theirs.get(path)
    if config.task != their_config.task and top not in encoder:
      continue
    if their is not None and _fits(path, x.shape, their.shape, encoder):
      taken.add(path)
    elif top != "head" or not encoder:
      if flags:
        raise _needs_flags(config, flags, their_config)
      has = "lacks it" if their is None else f"has the shape {their.shape}"
      raise ValueError(
        f"{where}; the parameter {path} has the shape {x.shape} by "
        f"config.model and config.attn, and that run {has}: see the config "
        "in its config.json"
      )
  return taken


def differs(config: ConfigDict, their_config: ConfigDict) -> str:
  """The fields in which a run computes another function; "" if none.

  The fields of config.attn and _FUNCTION may differ, since they need no other
  parameters.
  """
  return ", ".join(
    f"config.{path}={value_at(config, path)!r} in place of {theirs!r}"
    for path, theirs in _differing(
      config, their_config, _function(config)
    ).items()
  )


def _function(config):
  """The fields in which a run may compute another function."""
  attn = [f"attn.{key}" for key in config.attn if key != "implementation"]
  return [*attn, *_FUNCTION]


def _differing(config, their_config, paths):
  """{path: the value of their config}, of fields that both tasks have."""
  found = {}
  for path in paths:
    try:
      ours, theirs = value_at(config, path), value_at(their_config, path)
    except ValueError:
      continue  # One of the tasks has no such field.
    if path == "attn.num_kv_heads":
      # None means as many as the heads, which will be theirs.
      heads = value_at(their_config, "model.num_heads")
      ours, theirs = (heads if x is None else x for x in (ours, theirs))
    if path == "model.layer_scale" and None not in (ours, theirs):
      continue  # It is only the initial value of parameters.
    if ours != theirs:
      found[path] = theirs
  return found


def _needs_flags(config, flags, their_config):
  """flags: the values that the run needs, by path."""
  path = next(iter(flags))
  message = (
    f"config.{path}={value_at(config, path)!r}; must be {flags[path]!r} as in "
    f"the run of config.init_from={config.init_from!r}, which needs: "
    + _as_flags(flags)
  )
  others = _differing(config, their_config, _function(config))
  if others := {x: y for x, y in others.items() if x not in flags}:
    message += f"; to compute what the run does, add: {_as_flags(others)}"
  return ValueError(message)


def _as_flags(values):
  return " ".join(shlex.quote(f"--config.{x}={y}") for x, y in values.items())


def _fits(path, shape, their_shape, encoder):
  if path == "position" and encoder:
    return shape[1] == their_shape[1]
  return shape == their_shape


def take(
  config: ConfigDict, params: Any, their_config: ConfigDict, theirs: Any
) -> tuple[dict[str, Any], list[str]]:
  """`params`, with those in `names` replaced by theirs, as NumPy arrays.

  Also returns the paths of those that keep their initial values.
  """
  taken = names(config, params, their_config, theirs)
  ours, theirs = flatten(params), flatten(theirs)
  new = {path: np.asarray(x) for path, x in ours.items()}
  for path in taken:
    x = np.asarray(theirs[path])
    new[path] = x if x.shape == new[path].shape else _resized(x, new[path])
  return nested(new), sorted(ours.keys() - taken)


def _resized(theirs_TD, ours_TD):
  """Resizes a table of positions to another square of patches (cubic).

  If there is a class token, the first row belongs to it and stays as it is. It
  is left out if our model has no class token.
  """
  count, width = ours_TD.shape
  side, their_side = math.isqrt(count), math.isqrt(len(theirs_TD))
  # If the count is one more than a square, there is a class token.
  first, their_first = count - side**2, len(theirs_TD) - their_side**2
  logging.warning(
    "the positions of %d x %d patches are resized to %d x %d",
    their_side, their_side, side, side,
  )  # fmt: skip
  table = theirs_TD[their_first:].reshape(their_side, their_side, width)
  table = jax.image.resize(table, (side, side, width), "cubic")
  return np.concatenate([theirs_TD[:first], table.reshape(-1, width)])
