"""A folder of tokens: how runs read it, and which files are refused."""

import lzma

import jax
import numpy as np
import pytest

from configs import lm
from sigattn import tasks
from sigattn.data import text, train_tokenizer
from train import train

TEXT = "In the beginning there was a tokenizer, and it made tokens of text.\n"
SIZE = 300  # requested tokens; the text gives only 297


def write(path, token_S):
  with lzma.open(path, "wb") as file:
    np.save(file, np.asarray(token_S))


@pytest.fixture
def config(tmp_path):
  """A run of six steps on a folder with the splits train and validation."""
  folder = tmp_path / "tokens"
  folder.mkdir()
  train_tokenizer.train([TEXT], SIZE).save(str(folder / "tokenizer.json"))
  rng = np.random.default_rng(0)
  for split, count in (("train", 700), ("validation", 150)):
    write(folder / f"{split}.npy.xz", rng.integers(257, size=count, dtype="u2"))
  config = lm.get_config("runlocal")
  config.update_from_flattened_dict({
    "data.source": str(folder), "data.eval_split": "validation",
    "data.tokenizer": str(folder / "tokenizer.json"), "data.vocab_size": SIZE,
    "data.length": 16, "batch_size": 4, "total_steps": 6,
    "optim.schedule": "constant",
  })  # fmt: skip
  return config


def stored(config, split):
  with lzma.open(f"{config.data.source}/{split}.npy.xz") as file:
    return np.load(file)


def test_a_run_on_tokens_resumes_exactly(config, tmp_path):
  once = train(config, tmp_path / "once")
  config.total_steps = 3
  train(config, tmp_path / "twice")
  config.total_steps = 6
  twice = train(config, tmp_path / "twice")
  jax.tree.map(np.testing.assert_array_equal, once.params, twice.params)


def test_rows_are_the_tokens_and_each_is_evaluated_once(config):
  whole = stored(config, "validation")
  rows = [
    row
    for batch in tasks.eval_batches(config, "validation")
    for row, weight in zip(batch["token"], batch["weight"], strict=True)
    if weight
  ]
  targets = np.concatenate([row[1:] for row in rows])
  np.testing.assert_array_equal(targets[targets >= 0], whole[1:])
  trained = stored(config, "train").tobytes()
  batch = next(tasks.train_batches(config))["token"]
  assert batch.shape == (4, 17)
  for row in batch:
    assert row.astype(np.uint16).tobytes() in trained


def test_the_tokens_are_those_of_their_tokenizer(config):
  [ids] = text.tokenizer(config).encode([TEXT])
  write(f"{config.data.source}/train.npy.xz", ids.astype(np.uint16))
  config.batch_size = 1
  [row] = next(tasks.train_batches(config))["token"]
  assert text.tokenizer(config).decode(row[row >= 0]) in TEXT


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (
      {"data.tokenizer": "bytes"},
      r"config\.data\.tokenizer='bytes'; must be '.*tokenizer\.json'",
    ),
    (
      {"data.eval_split": "test"},
      r"config\.data\.eval_split='test'; choose from \['train', 'validation'\]",
    ),
    (
      {"data.eval_source": "kjv"},
      r"config\.data\.eval_source='kjv'; must be None",
    ),
    (
      {"data.length": 700},
      r"config\.data\.length=700; must be less than 700, the tokens of 'train'",
    ),
    ({"batch_size": 45}, r"config\.batch_size=45; must be at most 44"),
  ],
)
def test_what_does_not_fit_the_tokens_is_refused(
  values, message, config, tmp_path
):
  config.update_from_flattened_dict(values)
  with pytest.raises(ValueError, match=message):
    train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_tokens_are_no_part_of_a_mixture(config, tmp_path):
  folder, config.data.source = config.data.source, ""
  config.data.mixture = ((folder, 1.0),)
  config.data.eval_source = folder
  with pytest.raises(
    ValueError, match="config.data.mixture: .* is a folder of"
  ):
    train(config, tmp_path / "run")


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (np.array([1, 2, 300], np.uint16), "tokens up to 300; .* below 297"),
    (np.zeros((2, 20), np.uint16), r"holds uint16 \(2, 20\)"),
    (np.zeros(40, np.float32), r"holds float32 \(40,\)"),
    (np.zeros(0, np.uint16), "holds 0 tokens"),
    (b"no xz", "cannot be read"),
  ],
)
def test_a_damaged_file_of_tokens_is_refused(
  content, message, config, tmp_path
):
  path = tmp_path / "tokens" / "train.npy.xz"
  if isinstance(content, bytes):
    path.write_bytes(content)
  else:
    write(path, content)
  with pytest.raises(ValueError, match=r"train\.npy\.xz .*" + message):
    train(config, tmp_path / "run")
