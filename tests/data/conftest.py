"""Fixtures for the tests that read images with `datasets`."""

import pytest

from tests.data.pictures import picture, save


@pytest.fixture
def hub_offline(tmp_path, monkeypatch):
  """Keeps the cache of `datasets` in tmp_path, and the Hub out of reach."""
  import datasets
  import huggingface_hub

  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
  monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path, hub_offline):
  """A folder of images of two classes, for the splits train and test.

  The images have several sizes; one is grey and one is RGBA.
  """
  path = tmp_path / "images"
  for split, count in (("train", 3), ("test", 2)):
    for i in range(count):
      save(path / split / "cat" / f"{i}.png", picture(20 + i, 30, 3, i))
      save(path / split / "dog" / f"{i}.png", picture(25, 20 + i, 3, 9 + i))
  save(path / "train" / "dog" / "grey.png", picture(22, 22, 3), "L")
  save(path / "train" / "dog" / "rgba.png", picture(22, 22, 3), "RGBA")
  return path
