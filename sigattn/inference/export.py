"""Saves the model of a run as transformers' config.json and safetensors.

  python -m sigattn export --workdir=runs/lm --out=/models/mine

The model must have softmax attention and the layers of Llama, GPT-NeoX or ViT.
For other models, the error says what differs. `from_pretrained` of transformers
reads the folder. A tokenizer.json of the run is copied. The ids of special
tokens and the settings for generation are not written.
"""

import pathlib
import shutil

from absl import flags
from ml_collections import ConfigDict

from sigattn import pretrained
from sigattn.training import checkpoint, metrics


def define_flags() -> None:
  """Defines the flags of `python -m sigattn export`, except shared ones."""
  flags.DEFINE_string("out", None, "The folder to write.")
  flags.mark_flag_as_required("out")


def run(options: flags.FlagValues) -> None:
  """Loads the run's checkpoint and saves its model."""
  metrics.set_up_logs()
  pretrained.validate_new(options.out, "--out")
  config, params, step = checkpoint.load(options.workdir, options.step)
  pretrained.save(config, params, options.out)
  print(f"{options.out}: the model of step {step}")
  if tokenizer := _tokenizer(config, options.workdir):
    shutil.copyfile(tokenizer, pathlib.Path(options.out) / "tokenizer.json")
    print(f"{options.out}: {tokenizer}")
  elif config.task == "lm":
    print(f"no tokenizer.json: the tokenizer is {config.data.tokenizer!r}")


def _tokenizer(config: ConfigDict, workdir: str) -> pathlib.Path | None:
  """The file of the run's tokenizer, or None if it is not in a file."""
  if config.task != "lm" or config.data.tokenizer in ("characters", "bytes"):
    return None
  copy = pathlib.Path(workdir) / "tokenizer.json"
  given = pathlib.Path(config.data.tokenizer).expanduser()
  return next((path for path in (copy, given) if path.is_file()), None)
