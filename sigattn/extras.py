"""The optional parts of an installation, and what each of them needs.

The operation needs jax and numpy alone. Everything else asks here first, so
that a missing package is named together with the extra that brings it.
"""

import importlib.util

# The packages of each extra of pyproject.toml that the code imports, by the
# names that they are imported by.
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


def require(extra: str) -> None:
  """Raises ImportError that names the extra, where a package of it is missing.

  extra: a key of PACKAGES.
  """
  missing = [
    name for name in PACKAGES[extra] if importlib.util.find_spec(name) is None
  ]
  if missing:
    raise ImportError(
      f"this part of sigattn needs {', '.join(missing)}: "
      f"pip install 'sigattn[{extra}]'"
    )
