"""Reads a folder that transformers' save_pretrained or timm has written."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sigattn.pretrained.families import FAMILIES, Family, validate_types
from sigattn.validate import real


class Tensors:
  """The tensors of a folder's safetensors, which may be several files.

  shapes: {name: shape}. Raises ValueError if there are none.
  """

  def __init__(self, folder: str):
    import safetensors

    self.shapes, self._files = {}, {}
    try:
      for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        file = safetensors.safe_open(path, "flax")  # NumPy has no bfloat16.
        for name in file.keys():  # noqa: SIM118, it is no dict
          self._files[name] = file
          self.shapes[name] = tuple(file.get_slice(name).get_shape())
    except safetensors.SafetensorError as error:
      raise ValueError(f"{path.name} cannot be read: {error}") from error
    if self.shapes:
      return
    if pickled := sorted(pathlib.Path(folder).glob("*.bin")):
      raise ValueError(
        f"has {pickled[0].name}, but no *.safetensors: load the model with "
        "from_pretrained, and save it again with save_pretrained"
      )
    raise ValueError("has no *.safetensors")

  def __getitem__(self, name: str) -> np.ndarray:
    return np.asarray(self._files[name].get_tensor(name)).astype(np.float32)


class Model(NamedTuple):
  """What a folder contains.

  kind: a key of FAMILIES. values: those of our config, by path.
  """

  kind: str
  family: Family
  values: dict[str, Any]
  tensors: Tensors


def read(folder: str) -> Model:
  """The model in a folder.

  Raises ValueError for a folder without a model, and for a model that our
  config cannot describe.
  """
  try:
    return _read(pathlib.Path(folder))
  except KeyError as error:
    raise ValueError(
      f"config.init_from={str(folder)!r}; its config or tensors lack {error}"
    ) from error
  except ValueError as error:
    raise ValueError(f"config.init_from={str(folder)!r}; {error}") from error


def _read(folder):
  theirs = _config(folder)
  validate_types(theirs)
  is_timm = theirs.get("architecture", "").startswith("vit_")
  kind = theirs.get("model_type", "timm" if is_timm else None)
  if kind not in FAMILIES:
    raise ValueError(
      f"has model_type={kind!r}, must be one of "
      f"{sorted(set(FAMILIES) - {'timm'})}, or a vit_* of timm"
    )
  family, tensors = FAMILIES[kind], Tensors(folder)
  values = family.values(theirs, tensors.shapes)
  if family.task == "vit":
    values |= _normalisation(folder, theirs, values["data.channels"])
  elif (folder / "tokenizer.json").is_file():
    values |= {"data.tokenizer": str(folder / "tokenizer.json")}
  return Model(kind, family, values, tensors)


def _config(folder):
  if folder.is_file():
    raise ValueError(f"is a file; give its folder, {str(folder.parent)!r}")
  if not folder.is_dir():
    raise ValueError(
      "there is no such folder. Names of the Hugging Face Hub are not read: "
      "`hf download NAME --local-dir FOLDER` makes a folder"
    )
  try:
    return _json(folder / "config.json")
  except FileNotFoundError as error:
    raise ValueError("needs a config.json and *.safetensors") from error


def _json(path):
  """The dict in a file. Raises FileNotFoundError if there is none."""
  try:
    content = json.loads(path.read_text())
  except FileNotFoundError:
    raise
  except (OSError, ValueError) as error:
    reason = getattr(error, "strerror", None) or error
    raise ValueError(f"{path.name} cannot be read: {reason}") from error
  if not isinstance(content, Mapping):
    raise ValueError(f"{path.name} must contain an object")
  return content


def _normalisation(folder, config, channels):
  """The mean and the standard deviation of the images, if they are known."""
  try:
    theirs = _json(folder / "preprocessor_config.json")
    found = theirs.get("image_mean"), theirs.get("image_std")
  except FileNotFoundError:
    theirs = config.get("pretrained_cfg") or {}  # of timm
    found = theirs.get("mean"), theirs.get("std")
  if not all(isinstance(x, list) and len(x) == channels for x in found):
    return {}
  if not all(real().is_right(value) for x in found for value in x):
    raise ValueError(
      f"the mean and the standard deviation of the images are {found}; must be "
      "numbers"
    )
  mean, std = (tuple(map(float, x)) for x in found)
  return {"data.mean": mean, "data.std": std}
