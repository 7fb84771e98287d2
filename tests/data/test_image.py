"""Sources of images, and errors for wrong configs and files."""

import contextlib
import io
import re
import struct
import zlib

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from configs import vit_sigmoid
from eval import evaluate
from sigattn import tasks, validate
from sigattn.data import augment, image, loader
from tests.data.pictures import (
  AUGMENTED,
  equal,
  local,
  make,
  name_file,
  picture,
  save,
  take,
)
from train import train

pytestmark = pytest.mark.usefixtures("hub_offline")


def validate_source(config):
  validate.fields(config, loader.FIELDS | image.FIELDS, image.RULES)


@pytest.fixture
def warned(monkeypatch):
  """The warnings in the log."""
  lines = []
  monkeypatch.setattr(
    loader.logging, "warning", lambda line, *args: lines.append(line % args)
  )
  return lines


# The embedded set.


def test_batch_is_what_the_contract_says():
  [batch] = take(make(), 1)
  assert batch["image"].shape == (8, 28, 28, 1)
  assert batch["image"].dtype == np.uint8
  assert batch["target"].shape == (8,)
  assert batch["target"].dtype == np.int32


def test_config_changed_later_changes_nothing():
  config = make(**AUGMENTED)
  with contextlib.closing(tasks.train_batches(config)) as data:
    config.augment.update(crop="none", flip=False, randaugment_layers=0)
    equal([next(data)], take(make(**AUGMENTED), 1))


def test_evaluation_of_the_training_split_is_not_augmented():
  plain = next(iter(tasks.eval_batches(make(), "train")))
  equal([next(iter(tasks.eval_batches(make(**AUGMENTED), "train")))], [plain])


def test_unknown_split_is_refused_with_the_choices():
  with pytest.raises(ValueError, match=r"'valid'.*'test', 'train'"):
    tasks.eval_batches(make(), "valid")


def test_validation_split_is_the_end_of_the_training_split():
  train, rest, validation = (
    image.open_source(make(), split)
    for split in ("train", "train_without_validation", "validation")
  )
  assert (len(train), len(rest), len(validation)) == (10_000, 9_000, 1_000)
  ends = np.array([0, 999])
  equal([validation.evaluate(ends)], [train.evaluate(9_000 + ends)])
  equal([rest.evaluate(ends)], [train.evaluate(ends)])


def test_every_size_and_channel_comes_out_of_every_crop():
  for crop in augment.CROPS:
    values = {"augment.crop": crop, "data.image_size": 20, "data.channels": 3}
    config = make(**values)
    batches = take(config, 1) + [next(iter(tasks.eval_batches(config, "test")))]
    for batch in batches:
      assert batch["image"].shape == (8, 20, 20, 3)
      assert (batch["image"][..., 0] == batch["image"][..., 2]).all()


# Folders and parquet files.


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


def test_folder_of_images_is_trained_on_in_grey(folder, warned):
  config = local(folder, **AUGMENTED)
  config.data.update(channels=1, mean=(0.5,), std=(0.5,), num_workers=0)
  validate.fields(config, image.FIELDS, image.RULES)
  batches = take(config, 4)
  [line] = warned
  assert re.search("channels=1; .*images' have colour.*add --config.data", line)
  assert {b["image"].shape for b in batches} == {(4, 16, 16, 1)}
  for epoch in (batches[:2], batches[2:]):
    targets = np.concatenate([b["target"] for b in epoch])
    assert sorted(targets) == [0] * 3 + [1] * 5
  equal(batches, take(config, 4))


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
      decoded = image.decode(encoded(file.getvalue()), channels, 10**6)
      assert decoded.shape == (6, 9, channels)
      assert decoded.dtype == np.uint8
  turned = plain.getexif()
  turned[0x112] = 6  # an orientation that asks for a rotation by 90 degrees
  file = io.BytesIO()
  plain.save(file, "png", exif=turned)
  decoded = image.decode(encoded(file.getvalue()), 3, 10**6)
  np.testing.assert_array_equal(decoded, np.rot90(array, -1))


# Errors.


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
    config,
    r"(?s)source='/.*images', split 'train', row \d, path='/.*dog/1\.png': is "
    r"no image .*; config\.data\.max_corrupt_share is the share",
  )


def test_deep_image_is_refused_not_clipped(folder):
  deep = np.full((9, 9), 40_000, np.uint16)
  Image.fromarray(deep).save(folder / "train" / "dog" / "1.png")
  expect_refusal(local(folder), r"dog/1\.png.*mode I;16")


def huge_png(side):
  """The header of a PNG; its pixels are missing."""

  def chunk(kind, data):
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

  header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


def test_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
  columns = {"image": [encoded(huge_png(13_000))], "label": [0]}
  config = local(write_parquet(tmp_path / "huge", columns))
  expect_refusal(
    config, r"row 0: 13000 x 13000 pixels.*data\.max_pixels=100000000"
  )
  config.data.max_pixels = 400_000_000  # more than Pillow allows by itself
  expect_refusal(config, r"row 0: .*truncated")
  Image.MAX_IMAGE_PIXELS = 89_478_485


@pytest.mark.parametrize("way", ["absolute", "../secret.png", "a/../../x.png"])
def test_file_outside_of_the_folder_is_not_opened(way, tmp_path):
  save(tmp_path / "secret.png", picture(9, 9, 3))
  save(tmp_path / "x.png", picture(9, 9, 3))
  path = str(tmp_path / "secret.png") if way == "absolute" else way
  expect_refusal(
    local(parquet_that_names(path, tmp_path)),
    r"row 0, .*\.png' lies outside of the source's folder",
  )


def test_file_in_the_folder_is_opened(tmp_path):
  config = local(parquet_that_names("inside.png", tmp_path), batch_size=1)
  save(tmp_path / "parquet" / "inside.png", picture(9, 9, 3))
  [batch] = take(config, 1)
  assert batch["image"].shape == (1, 16, 16, 3)


def parquet_that_names(file, tmp_path):
  columns = {"image": [encoded(png(picture(9, 9, 3)))], "label": [0]}
  path = write_parquet(tmp_path / "parquet", columns)
  for parquet in path.glob("*.parquet"):
    name_file(parquet, "image", file)
  return path


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
  # The folder has to be read for this, so another error is named at once.
  expect_refusal(
    local(folder, batch_size=99, **{"data.num_classes": 3}),
    r"num_classes=3; must be 2, .*; config\.batch_size=99; must be at most 8",
  )
  # `datasets` knows it from now on.
  expect_refusal(
    local(folder, **{"data.num_classes": 3}), r"num_classes=3; must be 2"
  )
  config = make(**{"data.num_classes": 9})
  with pytest.raises(ValueError, match=r"config\.data\.num_classes=9"):
    validate.fields(config, image.FIELDS, image.RULES)


def test_classes_that_the_card_tells_are_compared_unread(tmp_path):
  """The card of a data set on the Hub lists its classes.

  They are compared before any data is read. This card is in a local folder.
  """
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
      make(**{"data.source": source}),
      f"{source}'; there is no such folder: choose an {choices}",
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
    config,
    r"eval_split='validation'; choose from \['test', 'train'\]\. No images are "
    "held out by themselves: divide them into the folders train/<class> and",
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


# Other people's tables and folders.


@pytest.mark.parametrize("label", ["integer", "name"])
@pytest.mark.parametrize("kind", ["struct", "bytes"])
def test_parquet_as_other_tools_write_it(kind, label, tmp_path, hub_offline):
  pictures = [png(picture(9, 9, 3, seed)) for seed in range(3)]
  if kind == "struct":
    pictures = [{"bytes": x, "path": None} for x in pictures]
  labels = {"integer": [1, 0, 1], "name": ["dog", "cat", "dog"]}[label]
  table = pyarrow.table({"image": pictures, "label": labels})
  (tmp_path / "mine").mkdir()
  for split, rows in (("train", table), ("test", table.slice(0, 1))):
    pyarrow.parquet.write_table(rows, tmp_path / "mine" / f"{split}.parquet")
  config = local(tmp_path / "mine", batch_size=1)
  validate_source(config)
  targets = [b["target"][0] for b in tasks.eval_batches(config, "train")]
  assert targets == [1, 0, 1]
  [batch] = tasks.eval_batches(config, "test")
  assert batch["target"] == [1]
  config.data.num_classes = 1
  expect_refusal(config, "label=1 is no class|num_classes=1; must be 2")


def test_a_class_that_a_split_lacks_is_named(folder, warned):
  for file in (folder / "test" / "dog").iterdir():
    file.unlink()
  tasks.eval_batches(local(folder), "test")
  tasks.eval_batches(local(folder), "train")
  [line] = warned  # none about colour, which this config keeps
  assert "split 'test'" in line
  assert "1 of the 2 classes: dog" in line


def test_hidden_files_are_no_images_and_no_class(folder):
  """See torchvision issues 109 and 2831."""
  save(folder / "train" / ".ipynb_checkpoints" / "x.png", picture(9, 9, 3))
  (folder / "train" / "dog" / "._1.png").write_bytes(b"\x00")
  (folder / "train" / ".DS_Store").write_bytes(b"\x00")
  config = local(folder)
  validate_source(config)
  batches = list(tasks.eval_batches(config, "train"))
  assert sum(batch["weight"].sum() for batch in batches) == 8


def test_a_class_that_lies_deeper_is_named(folder):
  save(folder / "train" / "dog" / "small" / "x.png", picture(9, 9, 3))
  expect_refusal(
    local(folder),
    r"equally deep.*'train/dog/small/x\.png' does not lie as deep as",
  )


def test_an_animated_picture_is_refused(folder):
  frames = [Image.fromarray(picture(9, 9, 3, seed)) for seed in range(3)]
  path = folder / "train" / "dog" / "1.png"
  frames[0].save(path, "gif", save_all=True, append_images=frames[1:])
  expect_refusal(local(folder), r"dog/1\.png.*3 frames: must be one image")
  frames[0].save(path, "mpo", save_all=True, append_images=frames[1:])
  assert take(local(folder), 3), "a camera's, with a preview"


# Training.


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


# Corrupt images.


def spoil(folder, split, *names):
  for name in names:
    (folder / split / name).write_bytes(b"no image")


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_skipped_named_and_resumed(workers, folder, warned):
  spoil(folder, "train", "cat/1.png", "dog/2.png")
  values = {"data.max_corrupt_share": 0.25, "data.num_workers": workers}
  config = local(folder, **AUGMENTED, **values)
  with contextlib.closing(tasks.train_batches(config)) as data:
    first = [next(data) for _ in range(3)]
    state = data.get_state()
    rest = [next(data) for _ in range(4)]
  assert all(set(batch) == {"image", "target"} for batch in first)
  assert len(warned) == 2, "each is named once"
  assert all("of at most 2" in line for line in warned)
  for name in ("cat/1.png", "dog/2.png"):
    assert any(name in line for line in warned)
  with contextlib.closing(tasks.train_batches(config)) as data:
    data.set_state(state)
    equal([next(data) for _ in range(4)], rest)
  config.data.num_workers = 0
  equal(take(config, 7), first + rest)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_corrupt_images_end_the_run_with_their_names(workers, folder):
  names = ["cat/0.png", "cat/1.png", "dog/2.png"]
  spoil(folder, "train", *names)
  values = {"data.max_corrupt_share": 0.25, "data.num_workers": workers}
  with pytest.raises(ValueError, match="3 examples are corrupt, of 8") as error:
    take(local(folder, **values), 8)
  assert all(name in str(error.value) for name in names)


def test_corrupt_images_are_not_evaluated(folder, warned):
  whole = local(folder)
  [wanted] = tasks.eval_batches(whole, "test")
  spoil(folder, "test", "cat/1.png")
  config = local(folder, **{"data.max_corrupt_share": 0.3})
  batches = tasks.eval_batches(config, "test")
  for _ in range(2):  # passes
    [batch] = batches
    np.testing.assert_array_equal(batch["weight"], [1, 0, 1, 1])
    kept = batch["weight"] > 0
    np.testing.assert_array_equal(batch["image"][kept], wanted["image"][kept])
  assert len(warned) == 1


def test_a_share_without_corrupt_images_changes_nothing(folder, warned):
  share = {"data.max_corrupt_share": 0.5}
  equal(take(local(folder, **share), 4), take(local(folder), 4))
  assert not warned
