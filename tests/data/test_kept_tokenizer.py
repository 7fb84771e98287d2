"""A run keeps its tokenizer: its texts may change or vanish."""

import shutil

import pytest

from configs import lm
from sigattn.data import text, train_tokenizer
from sigattn.inference.generate import Generator
from sigattn.training import run_dir, setup
from tests.training.test_run_dir import finish_a_step
from train import train


def make(source, tokenizer="characters", **values):
  config = lm.get_config("runlocal")
  config.data.update(source=str(source), tokenizer=str(tokenizer), length=16)
  config.update_from_flattened_dict(values)
  return config


def forget():
  """Lets this process read the texts again, as a new one would."""
  text._whole.cache_clear()
  text._characters.cache_clear()


def test_the_alphabet_is_kept_and_other_texts_are_refused(texts, run):
  config = make(texts)
  (texts / "0.txt").write_text("a zoo")
  forget()
  more = r"1 character more \('z'\)"
  changed = r"began with: 1 changed \('0\.txt'\)\. Give it the files"
  with pytest.raises(ValueError, match=f"cannot be resumed: .*{changed}"):
    train(config, run)
  # Another run cannot start from it with this alphabet, but with its own one.
  other = make(texts, init_from=str(run))
  with pytest.raises(ValueError, match=more) as caught:
    setup.validate_config(other)
  own = run / "tokenizer.json"
  assert f"--config.data.tokenizer={own} uses" in str(caught.value)
  other.data.tokenizer = str(own)
  setup.validate_config(other)
  shutil.rmtree(texts)
  forget()
  generator = Generator.load(run)
  [new] = generator(["the cat"], max_tokens=3)
  assert set(new) <= set("0123456789: thecasonm")
  own.unlink()
  with pytest.raises(ValueError, match=r"has no tokenizer\.json.* copy"):
    Generator.load(run)


def test_a_run_and_its_texts_have_separate_folders(tmp_path):
  (tmp_path / "a.txt").write_text("a cat sat on a mat\n" * 20)
  config, run = make(tmp_path), tmp_path / "runs" / "mine"
  with pytest.raises(ValueError, match="runs/mine'; must not be in config.dat"):
    begin(run, config)
  with pytest.raises(ValueError, match=r"a\.txt'; is a file, not a folder"):
    begin(tmp_path / "a.txt", config)
  run.mkdir(parents=True)
  for name in ("config.json", "metrics.jsonl"):
    (run / name).write_text("{}")
  with pytest.raises(
    ValueError, match=r"must not hold runs, and .*mine/metrics"
  ):
    setup.validate_config(config)


def begin(workdir, config):
  with run_dir.RunDir(workdir, config) as folder:
    folder.begin()


def test_the_file_of_a_tokenizer_is_kept(tmp_path):
  source, bpe = tmp_path / "a.txt", tmp_path / "bpe.json"
  source.write_text("a cat sat on a mat\n" * 20)
  train_tokenizer.train(["ca ca ca"], 258).save(str(bpe))
  config, run = make(source, bpe), tmp_path / "run"
  assert text.vocab_size(config) == 320  # 258, rounded up
  assert text.vocab_size(lm.get_config()) == 64
  assert text.vocab_size(lm.get_config("85m")) == 32768
  begin(run, config)
  finish_a_step(run)
  begin(run, config)
  moved = bpe.rename(tmp_path / "moved.json")
  begin(run, run_dir.validated(make(source, moved), run))
  moved.rename(bpe)
  train_tokenizer.train(["ma ma ma"], 258).save(str(bpe))
  with pytest.raises(ValueError, match=r"bpe\.json'; differs from .*tokenizer"):
    begin(run, config)
  bpe.unlink()
  begin(run, run_dir.validated(config, run))  # with its own copy
  kept = text.tokenizer(run_dir.load_config(run))
  assert [len(x) for x in kept.encode(["ca", "ma"])] == [1, 2]
