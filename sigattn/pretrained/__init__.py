"""Loads models of transformers and timm, and saves ours in transformers' form.

`config.init_from` names the folder of one of our runs, or a folder with a
config.json and safetensors, as `save_pretrained` of transformers and
`save_for_hf` of timm write it. A run then starts from these parameters and not
from random ones. It may have another config.attn.kind, and so another kind of
attention. In a notebook:

  config = lm_sigmoid.get_config()
  config.update_from_flattened_dict(pretrained.values(folder))
  config.init_from = folder

Llama, GPT-NeoX and ViT of transformers and the plain vit_* of timm are
supported. folder.py reads a folder, and families.py says what its tensors mean.
"""

import json
import os
import pathlib
import shlex
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from sigattn import layers
from sigattn.pretrained import folder as folder_of
from sigattn.pretrained.families import BLOCKS, FAMILIES
from sigattn.validate import text, value_at


def _init_from_has_the_shape(config):
  if config.init_from is None or is_run(config.init_from):
    return
  _, family, wanted, _ = folder_of.read(config.init_from)
  if family.task != config.task:
    file = {"lm": "lm_sigmoid", "vit": "vit_sigmoid"}[family.task]
    raise ValueError(
      f"config.init_from={config.init_from!r}; is a model of the task "
      f"{family.task!r}, not of config.task={config.task!r}: use "
      f"configs/{file}.py"
    )
  given = _ours(config, wanted)
  if config.attn.num_kv_heads is None:  # as many as the heads it will have
    given["attn.num_kv_heads"] = wanted["model.num_heads"]
  flags = {path: x for path, x in wanted.items() if given[path] != x}
  classes = flags.pop("data.num_classes", None)  # a new head may differ
  # Another tokenizer.json may be a copy of theirs.
  if given.get("data.tokenizer") not in ("characters", "bytes"):
    flags.pop("data.tokenizer", None)
  if not flags:
    return
  path = next(iter(flags))
  message = (
    f"config.{path}={value_at(config, path)!r}; must be {flags[path]!r} for "
    f"config.init_from={config.init_from!r}, whose model needs: "
    + " ".join(shlex.quote(f"--config.{x}={y}") for x, y in flags.items())
  )
  if classes is not None:
    message += (
      f" and, to keep its head of {classes} classes, "
      f"--config.data.num_classes={classes}"
    )
  raise ValueError(message + _unknown_normalisation(config, wanted))


def _unknown_normalisation(config, wanted):
  """A sentence, if the folder and the config lack a mean for the channels."""
  channels = wanted.get("data.channels")
  if channels is None or "data.mean" in wanted:
    return ""
  if len(config.data.mean) == len(config.data.std) == channels:
    return ""
  return (
    f". Also give --config.data.mean and --config.data.std, {channels} numbers "
    "each, with which the model was trained: the folder does not have them "
    "(image_mean and image_std of its preprocessor_config.json)"
  )


def is_run(folder: str) -> bool:
  """Whether config.init_from names the folder of one of our runs.

  sigattn.training.transfer says which parameters are then taken.
  """
  try:
    return (pathlib.Path(folder) / "checkpoints").is_dir()
  except (OSError, ValueError):
    return False


FIELDS = {"init_from": text(optional=True)}
RULES = (_init_from_has_the_shape,)


def _ours(config, paths):
  """The values of the config, with each None replaced by its meaning."""
  given = {path: value_at(config, path) for path in paths}
  if given.get("attn.num_kv_heads", 0) is None:
    given["attn.num_kv_heads"] = config.model.num_heads
  if given.get("model.norm_epsilon", 0) is None:
    given["model.norm_epsilon"] = layers.EPSILONS[config.model.norm_kind]
  return given


def values(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """The values of our config, by path, that describe the model in a folder.

  Pass them to ConfigDict.update_from_flattened_dict. Raises ValueError for a
  folder without a model, and for a model that our config cannot describe.
  """
  found = folder_of.read(folder).values
  return {path: x for path, x in found.items() if x is not None}


def _tensors_of(family, values):
  """(name, paths of ours, entry, index of the layer) of each tensor."""
  for entry in family.entries(values):
    if "{}" not in entry.theirs:
      yield entry.theirs, entry.ours, entry, ()
      continue
    paths = tuple(BLOCKS[family.task] + path for path in entry.ours)
    for i in range(values["model.depth"]):
      yield entry.theirs.format(i), paths, entry, (i,)


# Our parameters that their models lack. They keep their initial values.
_MAY_BE_NEW = ("attn/logit_bias",)


class Started(NamedTuple):
  """What a run starts from.

  kind: of the model: llama, gpt_neox, vit or timm. params: a nested dict of
  NumPy arrays. fresh: the paths of the arrays that keep their initial values.
  """

  kind: str
  params: dict[str, Any]
  fresh: list[str]


def start(config: ConfigDict, params: Mapping[str, Any]) -> Started:
  """Reads the parameters of config.init_from.

  params: the initial parameters. A logit bias that is trained keeps its initial
  value. So does the head if the model has another number of classes. Raises
  ValueError for a tensor that is missing, has another shape or is not known.
  """
  kind, family, found, tensors = folder_of.read(config.init_from)
  flat = flatten(params)
  loaded = {path: np.array(x) for path, x in flat.items()}
  fresh, unknown = set(loaded), set(tensors.shapes)
  new_head = family.task == "vit" and (
    found["data.num_classes"] != config.data.num_classes
  )
  differ = (
    f"config.init_from={config.init_from!r}; its config.json and its tensors "
    "disagree"
  )
  for name, paths, entry, layer in _tensors_of(family, found):
    unknown.discard(name)
    if new_head and paths[0].startswith("head/"):
      continue
    if name not in tensors.shapes:
      raise ValueError(f"{differ}: there is no tensor {name!r}")
    for path, part in zip(paths, entry.load(tensors[name]), strict=True):
      if loaded[path][layer].shape != part.shape:
        raise ValueError(
          f"{differ}: {name} has the shape {tensors.shapes[name]}, which does "
          f"not fit {path}, {loaded[path][layer].shape}"
        )
      loaded[path][layer] = part
      fresh.discard(path)
  if unknown := sorted(x for x in unknown if not x.endswith(_BUFFERS)):
    raise ValueError(f"{differ}: unknown tensors are {unknown[:10]}")
  allowed = {x for x in fresh if x.endswith(_MAY_BE_NEW)}
  if new_head:
    allowed |= {x for x in fresh if x.startswith("head/")}
  if fresh - allowed:
    raise ValueError(
      f"config.init_from={config.init_from!r}; its model lacks "
      f"{sorted(fresh - allowed)}"
    )
  return Started(kind, nested(loaded), sorted(fresh))


# Tables of constants, which old versions of transformers also saved.
_BUFFERS = (
  "rotary_emb.inv_freq", "attention.bias", "attention.masked_bias",
)  # fmt: skip


def save(
  config: ConfigDict,
  params: Mapping[str, Any],
  folder: str | os.PathLike[str],
) -> None:
  """Writes a model as transformers' config.json and model.safetensors.

  It creates the folder. Before anything is written, it raises ValueError for a
  model that is no Llama, GPT-NeoX or ViT of transformers, and for a folder that
  validate_new refuses.
  """
  import safetensors.numpy

  validate_new(folder)
  name, family, found = _fitting(config)
  flat = flatten(params)
  if "data.vocab_size" in found:  # None if it follows from the tokenizer
    found = found | {"data.vocab_size": len(flat["embed"])}
  tensors = {}
  for theirs, paths, entry, layer in _tensors_of(family, found):
    parts = [np.asarray(flat[path])[layer] for path in paths]
    tensors[theirs] = np.ascontiguousarray(entry.save(*parts), np.float32)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  length = getattr(config.model, "max_length", 0)
  described = FAMILIES[name].describe(found, length)
  (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
  path = folder / "model.safetensors"
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
  # Without this, only the owner of the file may read it.
  shutil.copymode(folder / "config.json", path)


# What the folder of a model or of a run contains.
_OF_MODELS = ("config.json", "tokenizer.json", "*.safetensors", "checkpoints")


def validate_new(
  folder: str | os.PathLike[str], argument: str = "folder"
) -> None:
  """Raises ValueError for a folder that contains a model or a run.

  argument: what names the folder, for the error.
  """
  path = pathlib.Path(folder)
  found = sorted({x.name for name in _OF_MODELS for x in path.glob(name)})
  if found:
    raise ValueError(
      f"{argument}={str(folder)!r}: has {', '.join(found)}, so it contains a "
      "model or a run; delete it or name another folder"
    )


# The values that a config must have to be one of their models.
_REQUIRED = {
  "llama": {
    "model.positions": ("rope",), "model.rope_share": (1.0,),
    "model.norm_kind": ("rmsnorm",), "model.mlp": ("swiglu",),
    "model.use_bias": (False,), "model.parallel": (False,),
    "model.logit_cap": (None,),
  },
  "gpt_neox": {
    "model.positions": ("rope",), "model.norm_kind": ("layernorm",),
    "model.mlp": ("gelu", "gelu_exact"), "model.use_bias": (True,),
    "model.logit_cap": (None,),
  },
  "vit": {
    "model.positions": ("learned",), "model.norm_kind": ("layernorm",),
    "model.mlp": ("gelu", "gelu_exact"), "model.pool": ("class",),
  },
}  # fmt: skip
_REQUIRED_OF_ALL = {
  "attn.kind": ("softmax",), "attn.qk_norm": ("none",), "attn.alibi": (False,),
  "attn.row_power": (0.0,), "attn.forget_gate": (False,),
  "model.norm": ("pre",),
  "model.layer_scale": (None,),
}  # fmt: skip


def _fitting(config):
  """(name, Family, values) of the family of the config's model."""
  reasons = {}
  for name, required in _REQUIRED.items():
    family = FAMILIES[name]
    if family.task != config.task:
      continue
    required = _REQUIRED_OF_ALL | required
    if name == "gpt_neox" or family.task == "vit":
      heads = (None, config.model.num_heads)
      required = required | {"attn.num_kv_heads": heads}
    wrong = []
    for path, right in required.items():
      if (value := value_at(config, path)) not in right:
        choices = " or ".join(map(repr, right))
        wrong.append(f"config.{path}={value!r}, not {choices}")
    if not wrong:
      return name, family, _ours(config, _paths(family))
    reasons[name] = wrong
  if not reasons:
    raise ValueError(
      f"config.task={config.task!r}; only models of 'lm' and 'vit' can be "
      "saved in the form of transformers"
    )
  nearest = min(reasons, key=lambda name: len(reasons[name]))
  message = (
    "transformers has no such model among those that can be saved; the nearest "
    f"is {nearest}, but {', '.join(reasons[nearest])}"
  )
  if config.attn.kind != "softmax":
    tools = ["eval.py"]
    if config.task == "lm":
      commands = "`python -m sigattn generate`, `python -m sigattn lm_eval`"
      tools.insert(0, commands)
    message += (
      f". transformers has no {config.attn.kind} attention; use "
      f"{' or '.join(tools)} on the run"
    )
  raise ValueError(message)


def _paths(family):
  """The fields that the entries and the description of a family read."""
  shared = (
    "model.width", "model.depth", "model.num_heads", "model.mlp_dim",
    "model.mlp", "model.norm_epsilon", "attn.num_kv_heads",
  )  # fmt: skip
  if family.task == "lm":
    return (
      *shared, "model.tied", "model.rope_base", "model.rope_share",
      "model.parallel", "data.vocab_size",
    )  # fmt: skip
  return (
    *shared, "model.patch_size", "model.pool", "data.image_size",
    "data.channels", "data.num_classes",
  )  # fmt: skip


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested parameters by path: {"embed/kernel": ...}."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{key}/")
    else:
      flat[prefix + key] = value
  return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten`."""
  tree = {}
  for path, value in flat.items():
    *parents, key = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[key] = value
  return tree
