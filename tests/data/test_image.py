"""Images: every source, the order, exact resume, and each augmentation."""

import contextlib
import io
import os
import pathlib
import signal
import subprocess
import sys

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from configs import vit, vit_sigmoid
from eval import evaluate
from sigattn import tasks, validate
from sigattn.data import augment, hub, image, loader
from train import train

ROOT = pathlib.Path(__file__).parents[2]


def validate_source(config):
  validate.fields(config, loader.FIELDS | image.FIELDS, image.RULES)


def make(**values):
  """The embedded set, small batches, no augmentation."""
  config = vit.get_config()
  config.batch_size = 8
  config.augment.update(crop="none", flip=False)
  config.update_from_flattened_dict(values)
  return config


def take(config, count):
  with contextlib.closing(tasks.train_batches(config)) as data:
    return [next(data) for _ in range(count)]


def equal(batches, others):
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for name in batch:
      np.testing.assert_array_equal(batch[name], other[name])


def rng(seed=0):
  return np.random.default_rng(seed)


def picture(height, width, channels, seed=0):
  """Blocks of random colours: smooth enough to resize, never symmetric."""
  small = rng(seed).integers(256, size=(4, 4, channels), dtype=np.uint8)
  return augment.resize(small[None], height, width)[0]


ALL = {
  "augment.crop": "pad",
  "augment.flip": True,
  "augment.randaugment_layers": 1,
}


# The order.


def test_batch_is_what_the_contract_says():
  [batch] = take(make(), 1)
  assert batch["image"].shape == (8, 28, 28, 1)
  assert batch["image"].dtype == np.uint8
  assert batch["target"].shape == (8,)
  assert batch["target"].dtype == np.int32


def test_batch_may_be_of_one_example():
  [batch] = take(make(batch_size=1), 1)
  assert batch["image"].shape[0] == 1


def test_seed_decides_order_and_augmentation():
  for values in ({}, ALL):
    equal(take(make(**values), 3), take(make(**values), 3))
  first, other = take(make(), 2), take(make(seed=1), 2)
  assert (first[0]["target"] != other[0]["target"]).any()
  assert (first[1]["target"] != other[1]["target"]).any()
  first, other = take(make(**ALL), 1)[0], take(make(), 1)[0]
  np.testing.assert_array_equal(first["target"], other["target"])
  assert (first["image"] != other["image"]).any()


def test_seed_decides_augmentation_of_the_same_images(monkeypatch):
  monkeypatch.setattr(loader, "_permutation", lambda n, *_: np.arange(n))
  first, other = take(make(**ALL), 1)[0], take(make(seed=1, **ALL), 1)[0]
  np.testing.assert_array_equal(first["target"], other["target"])
  assert (first["image"] != other["image"]).any()


def test_config_changed_later_changes_nothing():
  config = make(**ALL)
  with contextlib.closing(tasks.train_batches(config)) as data:
    config.augment.update(crop="none", flip=False, randaugment_layers=0)
    equal([next(data)], take(make(**ALL), 1))


@pytest.mark.parametrize("chunk", [1, 3, 7, 16])
def test_epoch_has_every_example_once_in_an_order_of_its_own(chunk):
  order = loader._Shuffled(7, chunk, seed=0)
  indices = np.concatenate([order[i] for i in range(100)])[:70].reshape(10, 7)
  for epoch in indices:
    assert sorted(epoch) == list(range(7))
  assert len({tuple(epoch) for epoch in indices}) == 10
  other = loader._Shuffled(7, chunk, seed=1)
  shifted = np.concatenate([other[i] for i in range(100)])[:70].reshape(10, 7)
  assert (indices[1:] != shifted[:-1]).any()


def test_whole_epoch_of_the_embedded_set_is_the_set():
  shuffled = take(make(batch_size=1000), 10)
  in_order = list(tasks.eval_batches(make(batch_size=1000), "train"))
  images = [
    np.concatenate([b["image"] for b in x]) for x in (shuffled, in_order)
  ]
  sums = [np.sort(x.sum((1, 2, 3), dtype=np.int64)) for x in images]
  np.testing.assert_array_equal(*sums)


def test_processes_share_what_one_process_would_have(monkeypatch):
  [whole] = take(make(), 1)
  monkeypatch.setattr(loader.jax, "process_count", lambda: 2)
  shares = []
  for index in range(2):
    monkeypatch.setattr(loader.jax, "process_index", lambda i=index: i)
    shares += take(make(), 1)
    evaluated = list(tasks.eval_batches(make(), "test"))
    assert len(evaluated) == 250
    assert evaluated[0]["image"].shape == (4, 28, 28, 1)
  both = {k: np.concatenate([s[k] for s in shares]) for k in whole}
  equal([both], [whole])


# Resume.


@pytest.mark.parametrize(
  ("workers", "source"), [(0, "embedded"), (2, "embedded"), (0, "folder")]
)
def test_resumes_bit_for_bit_where_it_was_saved(
  workers, source, tmp_path, request
):
  config = make(**ALL, **{"data.num_workers": workers})
  if source == "folder":
    config = local(request.getfixturevalue("folder"), **ALL)
  with (
    ocp.CheckpointManager(tmp_path / "ckpt") as manager,
    contextlib.closing(tasks.train_batches(config)) as data,
  ):
    for _ in range(3):
      next(data)
    save = grain.checkpoint.CheckpointSave(data)
    manager.save(3, args=ocp.args.Composite(data=save))
    rest = [next(data) for _ in range(4)]
    manager.wait_until_finished()
    with contextlib.closing(tasks.train_batches(config)) as again:
      restore = grain.checkpoint.CheckpointRestore(again)
      manager.restore(3, args=ocp.args.Composite(data=restore))
      equal([next(again) for _ in range(4)], rest)
  # Worker processes change nothing but the speed.
  config.data.num_workers = 0
  equal(take(config, 7)[3:], rest)
  assert (rest[0]["image"] != rest[1]["image"]).any()


def test_killed_run_leaves_no_workers(tmp_path):
  script = tmp_path / "run.py"
  script.write_text("""
import multiprocessing, os, signal
from configs import vit
from sigattn import tasks

if __name__ == "__main__":
  config = vit.get_config()
  config.data.num_workers = 2
  data = tasks.train_batches(config)
  next(data), next(data)  # the second is the second worker's
  print(len(multiprocessing.active_children()), flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
""")
  # Returns when the last process that holds the pipe is gone.
  done = subprocess.run(
    [sys.executable, script],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60,
    check=False,
  )  # fmt: skip
  assert done.returncode == -signal.SIGKILL
  assert done.stdout == "2\n"


# Evaluation.


def test_evaluation_has_every_example_once_and_padding_of_no_weight():
  batches = tasks.eval_batches(make(batch_size=192), "test")
  first_pass = list(batches)
  assert {b["image"].shape for b in first_pass} == {(192, 28, 28, 1)}
  weight = np.concatenate([b["weight"] for b in first_pass])
  assert weight.dtype == np.float32
  np.testing.assert_array_equal(weight, np.arange(len(weight)) < 2000)
  with np.load(hub.embedded("fashion_mnist", "fashion_mnist.npz")) as arrays:
    images = np.concatenate([b["image"] for b in first_pass])[:2000, ..., 0]
    np.testing.assert_array_equal(images, arrays["x_test"])
    targets = np.concatenate([b["target"] for b in first_pass])[:2000]
    np.testing.assert_array_equal(targets, arrays["y_test"])
  equal(batches, first_pass)


def test_evaluation_of_the_training_split_is_not_augmented():
  plain = next(iter(tasks.eval_batches(make(), "train")))
  equal([next(iter(tasks.eval_batches(make(**ALL), "train")))], [plain])


def test_unknown_split_is_refused_with_the_choices():
  with pytest.raises(ValueError, match=r"'valid'.*'test', 'train'"):
    tasks.eval_batches(make(), "valid")


def test_evaluation_crops_the_middle_where_training_crops():
  images = np.zeros((1, 320, 640, 3), np.uint8)
  images[:, 20:300, 180:460] = 255  # the middle 224 of 256
  cropped = augment.evaluate(images, 224, "inception")
  assert cropped.shape == (1, 224, 224, 3)
  assert cropped[:, 2:-2, 2:-2].min() == 255
  assert augment.evaluate(images, 224, "pad")[0, :, 0].max() == 0


def test_every_size_and_channel_comes_out_of_every_crop():
  for crop in augment.CROPS:
    values = {"augment.crop": crop, "data.image_size": 20, "data.channels": 3}
    config = make(**values)
    batches = take(config, 1) + [next(iter(tasks.eval_batches(config, "test")))]
    for batch in batches:
      assert batch["image"].shape == (8, 20, 20, 3)
      assert (batch["image"][..., 0] == batch["image"][..., 2]).all()


# Augmentation.


def test_shift_moves_by_up_to_pad_and_fills_with_zeros():
  images = rng().integers(1, 256, size=(500, 6, 7, 2), dtype=np.uint8)
  shifted = augment.shift(images, 2, rng())
  padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
  offsets = []
  for i in range(500):
    offsets += [
      (y, x)
      for y in range(5)
      for x in range(5)
      if (shifted[i] == padded[i, y : y + 6, x : x + 7]).all()
    ]
  assert len(offsets) == 500
  assert len(set(offsets)) == 25
  assert np.abs(np.mean(offsets, axis=0) - 2).max() < 0.25


def test_flip_mirrors_half_of_the_images():
  images = rng().integers(256, size=(1000, 3, 4, 1), dtype=np.uint8)
  flipped = augment.flip(images, rng())
  same = (flipped == images).all((1, 2, 3))
  mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
  assert (same ^ mirrored).all()
  assert 450 < mirrored.sum() < 550


@pytest.mark.parametrize("shape", [(100, 100), (80, 120)])
def test_inception_box_keeps_to_its_area_and_aspect(shape):
  height, width = shape
  boxes = [augment.inception_box(*shape, 0.3, g) for g in [rng()] * 2000]
  left, top, right, bottom = np.array(boxes).T
  assert left.min() >= 0
  assert top.min() >= 0
  assert right.max() <= width
  assert bottom.max() <= height
  w, h = right - left, bottom - top
  area = w * h / (height * width)
  assert 0.29 < area.min() < 0.33
  assert area.max() > 0.8
  assert 0.72 < (w / h).min() < 0.78
  assert 1.3 < (w / h).max() < 1.36
  assert np.ptp(left) > 0.3 * width


def test_inception_box_of_an_image_too_long_is_its_middle():
  assert augment.inception_box(30, 900, 0.9, rng()) == (430, 0, 470, 30)
  assert augment.inception_box(1, 1, 0.08, rng()) == (0, 0, 1, 1)


def test_inception_resizes_the_box():
  image_HWC = picture(40, 50, 3)
  cropped = augment.inception(image_HWC, 16, 0.2, rng())
  left, top, right, bottom = augment.inception_box(40, 50, 0.2, rng())
  part = image_HWC[None, top:bottom, left:right]
  np.testing.assert_allclose(
    cropped, augment.resize(part, 16, 16)[0].astype(float), atol=40
  )
  assert (
    np.abs(cropped - augment.resize(part, 16, 16)[0].astype(int)).mean() < 3
  )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_operation_keeps_the_kind_of_image_and_changes_it(name, channels):
  array = picture(32, 24, channels) // 2 + 30
  for m in (-1, 0, 0.5, 1):
    changed = augment.OPERATIONS[name](augment.to_pillow(array), m)
    changed = augment.to_array(changed)
    assert changed.shape == array.shape
    assert changed.dtype == np.uint8
  unchanged = name == "identity" or (name == "color" and channels == 1)
  assert (changed == array).all() == unchanged


SIGNED = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
SIGNED += ("color", "contrast", "brightness", "sharpness")


@pytest.mark.parametrize("name", SIGNED + ("solarize", "posterize"))
def test_operation_grows_with_its_magnitude(name):
  # A ramp to move, in different colours, with noise to sharpen.
  y, x = np.mgrid[:64, :64]
  noise = rng().integers(16, size=(64, 64, 3))
  array = (np.stack([y, x, y + x], -1) + noise + 60).astype(np.uint8)
  change = []
  for m in (0, 0.3, 0.6, 1):
    changed = augment.OPERATIONS[name](augment.to_pillow(array), m)
    change.append(np.abs(augment.to_array(changed) - array.astype(int)).mean())
  assert change[0] == 0
  assert change == sorted(change)
  assert len(set(change)) >= 3
  other = augment.OPERATIONS[name](augment.to_pillow(array), -1)
  assert (augment.to_array(other) != augment.to_array(changed)).any() == (
    name in SIGNED
  )


def test_moved_image_leaves_grey_and_moves_as_far_as_it_should():
  array = np.zeros((331, 331, 1), np.uint8)
  moved = augment.OPERATIONS["translate_x"](augment.to_pillow(array), 1)
  assert (np.asarray(moved) == augment.GREY).sum() == 331 * 150


def test_randaugment_draws_every_operation_and_so_many_layers(monkeypatch):
  calls = []

  def spy(name):
    return lambda picture, m: calls.append((name, m)) or picture

  spies = {name: spy(name) for name in augment.OPERATIONS}
  monkeypatch.setattr(augment, "OPERATIONS", spies)
  generator = rng()
  for _ in range(200):
    augment.randaugment(np.zeros((4, 4, 3), np.uint8), 3, 9, generator)
  assert len(calls) == 600
  assert {name for name, _ in calls} == set(spies)
  assert len(spies) == 14
  assert {m for _, m in calls} == {-0.9, 0.9}


# Folders and parquet files.


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """Keeps what `datasets` writes, and every look at the Hub, out of a test."""
  import datasets
  import huggingface_hub

  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
  monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def save(path, array, mode="RGB"):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
  """Two classes, nine images; of several sizes, one grey and one RGBA."""
  path = tmp_path / "images"
  for split, count in (("train", 3), ("test", 2)):
    for i in range(count):
      save(path / split / "cat" / f"{i}.png", picture(20 + i, 30, 3, i))
      save(path / split / "dog" / f"{i}.png", picture(25, 20 + i, 3, 9 + i))
  save(path / "train" / "dog" / "grey.png", picture(22, 22, 3), "L")
  save(path / "train" / "dog" / "rgba.png", picture(22, 22, 3), "RGBA")
  return path


def local(path, **values):
  config = make(batch_size=4)
  config.data.update(source=str(path), num_classes=2, channels=3, image_size=16)
  config.data.update(mean=(0.5,) * 3, std=(0.5,) * 3)
  config.update_from_flattened_dict(values)
  return config


def test_folder_of_images_is_read_whole(folder, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  before = sorted(folder.rglob("*"))
  config = local("images")
  validate.fields(config, image.FIELDS, image.RULES)
  batches = list(tasks.eval_batches(config, "train"))
  assert [b["weight"].sum() for b in batches] == [4, 4]
  assert {b["image"].shape for b in batches} == {(4, 16, 16, 3)}
  targets = np.concatenate([b["target"] for b in batches])
  assert sorted(targets) == [0] * 3 + [1] * 5
  images = np.concatenate([b["image"] for b in batches])
  wanted = augment.resize(picture(21, 30, 3, 1)[None], 16, 16)[0]
  assert sum((x == wanted).all() for x in images[targets == 0]) == 1
  grey = [(x[..., 0] == x[..., 1]).all() for x in images]
  assert sum(grey) == 1
  assert sorted(folder.rglob("*")) == before


def test_folder_of_images_is_trained_on_in_grey(folder):
  config = local(folder, **ALL)
  config.data.update(channels=1, mean=(0.5,), std=(0.5,), num_workers=0)
  validate.fields(config, image.FIELDS, image.RULES)
  batches = take(config, 4)
  assert {b["image"].shape for b in batches} == {(4, 16, 16, 1)}
  for epoch in (batches[:2], batches[2:]):
    targets = np.concatenate([b["target"] for b in epoch])
    assert sorted(targets) == [0] * 3 + [1] * 5
  equal(batches, take(config, 4))


def test_workers_decode_what_threads_do(folder):
  values = ALL | {"augment.crop": "inception"}
  workers = {"data.num_workers": 1}
  equal(
    take(local(folder, **values), 3),
    take(local(folder, **values, **workers), 3),
  )


def png(array):
  file = io.BytesIO()
  Image.fromarray(array).save(file, "png")
  return file.getvalue()


def write_parquet(path, columns, **features):
  import datasets

  path.mkdir(exist_ok=True)
  kinds = {
    "image": datasets.Image(decode=False),
    "label": datasets.ClassLabel(names=["cat", "dog"]),
    "text": datasets.Value("string"),
  }
  kinds = {name: kinds[features.get(name, name)] for name in columns}
  table = datasets.Dataset.from_dict(columns, datasets.Features(kinds))
  for split in ("train", "test"):
    table.to_parquet(path / f"{split}-00000-of-00001.parquet")
  return path


def encoded(content):
  return {"bytes": content, "path": None}


def test_parquet_files_are_read(tmp_path):
  arrays = [picture(16, 16, 3, seed) for seed in range(5)]
  columns = {
    "img": [encoded(png(x)) for x in arrays],
    "label": [0, 1, 1, 0, 1],
  }
  path = write_parquet(tmp_path / "parquet", columns, img="image")
  config = local(path)
  validate.fields(config, image.FIELDS, image.RULES)
  first, second = tasks.eval_batches(config, "test")
  np.testing.assert_array_equal(first["image"], arrays[:4])
  np.testing.assert_array_equal(second["image"][0], arrays[4])
  np.testing.assert_array_equal(second["weight"], [1, 0, 0, 0])
  np.testing.assert_array_equal(first["target"], [0, 1, 1, 0])


def test_every_form_of_an_image_becomes_grey_or_colour():
  array = picture(6, 9, 3)
  plain = Image.fromarray(array)
  for mode in ("L", "RGB", "RGBA", "P", "CMYK", "1", "LA"):
    for channels in (1, 3):
      file = io.BytesIO()
      plain.convert(mode).save(file, "tiff")
      decoded = image.decode(encoded(file.getvalue()), channels)
      assert decoded.shape == (6, 9, channels)
      assert decoded.dtype == np.uint8
  turned = plain.getexif()
  turned[0x112] = 6  # the orientation: to be turned by 90 degrees
  file = io.BytesIO()
  plain.save(file, "png", exif=turned)
  decoded = image.decode(encoded(file.getvalue()), 3)
  np.testing.assert_array_equal(decoded, np.rot90(array, -1))


# Refusals.


def expect_refusal(config, message):
  def read():
    validate.fields(config, image.FIELDS, image.RULES)
    list(tasks.eval_batches(config, config.data.train_split))

  with pytest.raises(ValueError, match=message):
    read()


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_named(folder, workers):
  (folder / "train" / "dog" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nnot one")
  config = local(folder, **{"data.num_workers": workers})
  expect_refusal(
    config, r"(?s)source='/.*images', split 'train', row \d.*dog/1\.png"
  )


def test_deep_image_is_refused_not_clipped(folder):
  deep = np.full((9, 9), 40_000, np.uint16)
  Image.fromarray(deep).save(folder / "train" / "dog" / "1.png")
  expect_refusal(local(folder), r"dog/1\.png.*mode I;16")


def test_missing_column_is_refused_with_those_there_are(tmp_path):
  images = [encoded(png(picture(9, 9, 3)))] * 2
  path = write_parquet(tmp_path / "a", {"image": images, "text": ["a", "b"]})
  expect_refusal(
    local(path), r"source='/.*/a'; needs .* ClassLabel.*'image'.*'text'"
  )
  path = write_parquet(tmp_path / "b", {"label": [0, 1], "text": ["a", "b"]})
  expect_refusal(local(path), r"/b'; needs .* Image.*'label'.*'text'")
  columns = {"label": [0, 1], "one": images, "two": images}
  path = write_parquet(tmp_path / "c", columns, one="image", two="image")
  expect_refusal(local(path), r"/c'; needs one column of the kind Image.*'two'")


def test_example_without_a_class_is_refused(tmp_path):
  columns = {"image": [encoded(png(picture(9, 9, 3)))] * 2, "label": [0, -1]}
  path = write_parquet(tmp_path / "parquet", columns)
  expect_refusal(local(path), r"split 'train', row 1: label=-1")


def test_number_of_classes_is_compared(folder):
  expect_refusal(
    local(folder, **{"data.num_classes": 3}), r"num_classes=3; must be 2"
  )
  config = make(**{"data.num_classes": 9})
  with pytest.raises(ValueError, match=r"config\.data\.num_classes=9"):
    validate.fields(config, image.FIELDS, image.RULES)


def test_classes_that_the_card_tells_are_compared_unread(tmp_path):
  """A Hub name's card comes first; here it lies in a folder."""
  columns = {"image": [encoded(b"not read")], "label": [0]}
  path = write_parquet(tmp_path / "parquet", columns)
  names = "names: {'0': cat, '1': dog}"
  (path / "README.md").write_text(
    "---\ndataset_info: {features: [{name: image, dtype: image}, "
    f"{{name: label, dtype: {{class_label: {{{names}}}}}}}]}}\n---\n"
  )
  validate_source(local(path))
  with pytest.raises(ValueError, match="num_classes=3; must be 2"):
    validate_source(local(path, **{"data.num_classes": 3}))


def test_source_that_is_not_there_is_refused(folder):
  choices = r"embedded set \(\['fashion_mnist'\]\), a local folder, or"
  for source in ("fashion_mnits", str(folder / "no")):
    expect_refusal(
      make(**{"data.source": source}), f"{source}'; choose an {choices}"
    )
  expect_refusal(
    make(**{"data.source": ""}), "must be a string that is not empty"
  )
  expect_refusal(
    make(**{"data.source": "no/such"}), "'no/such': cannot be read: "
  )
  (folder / "empty").mkdir()
  expect_refusal(local(folder / "empty"), "empty': cannot be read: ")
  config = local(folder, **{"data.eval_split": "validation"})
  expect_refusal(
    config, r"eval_split='validation'; choose from \['test', 'train'\]"
  )


@pytest.mark.parametrize(
  ("path", "value"),
  [
    ("seed", -1),
    ("augment.crop", "random"),
    ("augment.pad", -1),
    ("augment.min_area", 0.0),
    ("augment.min_area", 1.5),
    ("augment.randaugment_layers", -1),
    ("augment.randaugment_magnitude", 11),
    ("data.image_size", 0),
    ("data.channels", 2),
    ("data.mean", (0.1, 0.2)),
    ("data.mean", (float("nan"),)),
    ("data.std", (0.0,)),
    ("data.std", (0.5, 0.5)),
    ("data.num_classes", 0),
    ("data.num_workers", -1),
    ("data.train_split", "trian"),
  ],
)
def test_bad_value_is_refused_with_its_path(path, value):
  with pytest.raises(ValueError, match=rf"config\.{path}=") as error:
    validate_source(make(**{path: value}))
  assert repr(value) in str(error.value)


def test_the_imagenet_recipe_trains_and_resumes_on_a_folder(folder, tmp_path):
  config = vit_sigmoid.get_config("imagenet,Ti/16,runlocal")
  config.data.update(
    source=str(folder), eval_split="test", num_classes=2, image_size=32,
    num_workers=0,
  )  # fmt: skip
  assert config.augment.randaugment_layers == 2
  config.total_steps = 1
  train(config, tmp_path / "run")
  config.total_steps = 2
  assert int(train(config, tmp_path / "run").step) == 2
  results = evaluate(tmp_path / "run")
  assert results["step"] == 2
  assert 0 <= results["accuracy"] <= 1
