"""Saves the model of a run as transformers' config.json and safetensors.

  python -m sigattn export --workdir=runs/lm --out=/models/mine

Models with softmax attention fit whose layers are those of Llama, GPT-NeoX or
ViT; for others the error says what differs. `from_pretrained` of transformers
reads the folder.
"""

from absl import flags

from sigattn import pretrained
from sigattn.training import checkpoint


def define_flags() -> None:
  """Defines the flags of `python -m sigattn export`, except shared ones."""
  flags.DEFINE_string("out", None, "The folder to write.")
  flags.mark_flag_as_required("out")


def run(options: flags.FlagValues) -> None:
  """Loads the run's checkpoint and saves its model."""
  config, params, step = checkpoint.load(options.workdir, options.step)
  pretrained.save(config, params, options.out)
  print(f"{options.out}: the model of step {step}")
