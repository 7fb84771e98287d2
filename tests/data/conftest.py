"""Fixtures: images that `datasets` reads, and a run on texts."""

import shutil

import pytest

from configs import lm
from tests.data.pictures import picture, save
from train import train


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


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
  """A folder with my/texts, and with a run on them, whose source is this name.

  Tests copy it.
  """
  folder = tmp_path_factory.mktemp("trained")
  texts = folder / "my" / "texts"
  texts.mkdir(parents=True)
  for i in range(40):
    (texts / f"{i}.txt").write_text(f"{i}: the cat sat on the mat")
  config = lm.get_config("runlocal")
  config.data.update(source="my/texts", length=16)
  config.eval.length_factors = ()
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    train(config, "run")
  return folder


@pytest.fixture
def texts(trained, tmp_path):
  """The texts of `run`, in tmp_path / my / texts."""
  return shutil.copytree(trained / "my" / "texts", tmp_path / "my" / "texts")


@pytest.fixture
def run(trained, tmp_path):
  """A run on `texts`, in tmp_path / run."""
  return shutil.copytree(trained / "run", tmp_path / "run")
