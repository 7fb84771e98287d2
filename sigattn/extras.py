"""The optional parts of an installation, and what each of them needs.

The operation needs only jax and numpy. All other modules call `require` first,
so that an error names a missing package and the extra that installs it.
"""

import importlib.util

# For each extra of pyproject.toml, the packages that the code imports, under
# their import names.
PACKAGES = {
  "layers": ("flax",),
  "train": (
    "flax", "optax", "orbax", "ml_collections", "absl", "grain", "datasets",
    "tokenizers", "PIL", "rich", "matplotlib", "tensorboardX", "scipy",
    "filelock", "huggingface_hub", "safetensors",
  ),
  "selfsup": ("dm_pix",),
  "speech": ("soundfile", "scipy", "jiwer", "pyarrow"),
  "eval": ("lm_eval",),
}  # fmt: skip


class MissingPackagesError(ImportError):
  """The packages of an extra are not installed."""


def require(extra: str) -> None:
  """Raises MissingPackagesError, which names the extra, unless it is installed.

  extra: a key of PACKAGES.
  """
  missing = [
    name for name in PACKAGES[extra] if importlib.util.find_spec(name) is None
  ]
  if missing:
    raise MissingPackagesError(
      f"this part of sigattn needs {', '.join(missing)}: "
      f"pip install 'sigattn[{extra}]', or in a checkout "
      f"pip install '.[{extra}]'"
    )
