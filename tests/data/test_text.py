"""Texts: sources, tokenizers, packing, mixtures, and exact resumption."""

import gzip
import json
import pathlib
import re
import subprocess
import sys
import types

import datasets
import numpy as np
import pytest

from configs import lm
from sigattn import tasks
from sigattn.data import (
  text,
  text_documents,
  text_files,
  tokenizers,
  train_tokenizer,
)
from sigattn.training import setup
from train import train

ROOT = pathlib.Path(__file__).parents[2]


def make(**values):
  config = lm.get_config("runlocal")
  config.data.update(tokenizer="bytes", vocab_size=257, length=16)
  config.update_from_flattened_dict(values)
  return config


def documents(count, seed=0):
  """Texts of 2 to 58 characters; each begins with its number."""
  rng = np.random.default_rng(seed)
  return [f"{i}:" + "x" * rng.integers(56) for i in range(count)]


def write(path, texts):
  lines = "".join(
    json.dumps({"text": x, "id": i}) + "\n" for i, x in enumerate(texts)
  )
  if path.suffix == ".gz":
    path.write_bytes(gzip.compress(lines.encode()))
  elif path.suffix == ".parquet":
    datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
  else:
    path.write_text(lines)
  return str(path)


def rows_of(batches):
  return [
    {name: batch[name][i] for name in batch}
    for batch in batches
    for i in range(len(batch["token"]))
    if batch.get("weight", np.ones(99))[i]
  ]


def texts_of(rows):
  """The pieces of documents in the rows: (whether `end` is first, text)."""
  pieces = []
  for row in rows:
    for segment in range(1, row["segment"].max() + 1):
      ids = row["token"][row["segment"] == segment]
      pieces.append((ids[0] == 256, tokenizers.Bytes().decode(ids)))
  return pieces


# The embedded text.


def test_embedded_text_is_cut_as_told():
  config = lm.get_config("runlocal")
  train, test, rest, validation = (
    text._part(config, x)
    for x in ("train", "test", "train_without_validation", "validation")
  )
  assert train.startswith("In the beginning God created")
  assert test.endswith("Amen.\n")
  assert len(train) + len(test) == 4_137_850
  assert len(test) == len(validation) == 206_892
  assert rest + validation == train


def test_evaluation_predicts_every_character_but_the_first_once():
  config = lm.get_config("runlocal")
  config.update_from_flattened_dict({"batch_size": 7, "data.length": 1000})
  rows = rows_of(tasks.eval_batches(config, "test"))
  ids = np.concatenate([row["token"][1:] for row in rows])
  whole = text._part(config, "test")
  assert text.tokenizer(config).decode(ids[ids >= 0]) == whole[1:]


def test_training_rows_are_text_and_each_epoch_cuts_anew():
  config = lm.get_config("runlocal")
  config.data.length = 400_000  # 10 rows per epoch
  config.batch_size = 10
  data = tasks.train_batches(config)
  whole = text._part(config, "train")
  starts = []
  for _ in range(2):
    rows = next(data)["token"]
    decoded = [text.tokenizer(config).decode(row) for row in rows]
    starts.append({whole.index(x) for x in decoded})
  end = len(whole) - 400_001  # the last position at which a row can begin
  assert not starts[0] & starts[1] - {end}
  for epoch in starts:
    assert {x // 400_000 for x in epoch - {end}} >= set(range(9))


# Tokenizers.


def test_characters_and_bytes_come_back():
  characters = tokenizers.Characters("\n abc")
  [ids] = characters.encode(["cab a\n"])
  assert characters.decode([*ids, characters.end]) == "cab a\n"
  assert characters.start == 0
  with pytest.raises(ValueError, match=r"characters \['d'\]"):
    characters.encode(["bad"])
  original = "naïve Ω 猫"
  [ids] = tokenizers.Bytes().encode([original])
  assert tokenizers.Bytes().decode(ids) == original
  num_bytes = tokenizers.Bytes().num_bytes()[ids].sum()
  assert len(ids) == len(original.encode()) == num_bytes


def test_bpe_is_trained_saved_and_counts_bytes(tmp_path):
  texts = ["the naïve cat sat on the mat, the cat 猫"] * 20
  source = write(tmp_path / "a.jsonl", texts)
  out = tmp_path / "bpe.json"
  command = [sys.executable, "-m", "sigattn", "train_tokenizer", "--size=270"]
  command += [f"--source={source}", f"--out={out}"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert "bpe.json: 270 tokens" in done.stdout, done.stderr
  assert "not reached" not in done.stdout
  bpe = tokenizers.File(out, 270)
  assert bpe.size == 270
  [ids] = bpe.encode([texts[0]])
  assert len(ids) < len(texts[0].encode())
  assert bpe.decode([*ids, bpe.end]) == texts[0]
  assert bpe.num_bytes()[ids].sum() == len(texts[0].encode())
  assert bpe.num_bytes()[bpe.end] == 0
  other = "Ω — never seen"
  assert bpe.decode(bpe.encode([other])[0]) == other
  with pytest.raises(ValueError, match="is no tokenizer"):
    tokenizers.File(source, 270)


@pytest.mark.parametrize(
  ("out", "said"), [("no/a.json", "there is no folder"), ("a.txt", "exists")]
)
def test_the_file_of_a_new_tokenizer_is_tried_first(out, said, tmp_path):
  (tmp_path / "a.txt").write_text("mine")
  options = types.SimpleNamespace(
    source="/no/source", size=300, out=str(tmp_path / out)
  )
  with pytest.raises(ValueError, match=f"--out=.*: {said}"):
    train_tokenizer.run(options)
  assert (tmp_path / "a.txt").read_text() == "mine"


def test_corrupt_texts_of_a_new_tokenizer_are_skipped_up_to_the_share(tmp_path):
  for i, content in enumerate(documents(6)):
    (tmp_path / f"{i}.txt").write_text(content)
  (tmp_path / "6.txt").write_bytes(b"\xff")
  options = types.SimpleNamespace(
    source=str(tmp_path), split="train", column="text", lines=False, size=270,
    documents=100, max_corrupt_share=0.0, out=str(tmp_path / "out"),
  )  # fmt: skip
  with pytest.raises(ValueError, match=r"6\.txt: .* --max_corrupt_share=0\.1$"):
    train_tokenizer.run(options)
  options.max_corrupt_share = 0.2
  train_tokenizer.run(options)
  assert (tmp_path / "out").is_file()
  options.source, options.out = "/no/source", str(tmp_path / "other")
  with pytest.raises(ValueError, match="^--source='/no/source'; there is no"):
    train_tokenizer.run(options)


def test_an_id_beyond_the_vocabulary_is_refused_before_arrays_are_made(
  tmp_path,
):
  path = tmp_path / "large.json"
  model = {"type": "WordLevel", "unk_token": "?"}
  model["vocab"] = {"?": 0, tokenizers.END: 1, "far": 2**32 - 1}
  path.write_text(json.dumps({"version": "1.0", "model": model}))
  config = make(**{"data.tokenizer": str(path), "data.vocab_size": 64})
  with pytest.raises(
    ValueError, match=r"config\.data\.vocab_size=64; .*'far' .*4294967295"
  ):
    text.tokenizer(config)


# Streams.


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_evaluation_of_a_file_has_every_document_whole(name, tmp_path):
  texts = documents(30)
  path = write(tmp_path / name, texts)
  config = make(**{"data.source": "kjv/train", "data.eval_source": path})
  batches = tasks.eval_batches(config, "test")
  rows = rows_of(batches)
  assert max(len(row["token"]) for row in rows) == 17
  for row in rows:
    assert ((row["token"] == -1) == (row["segment"] == 0)).all()
  pieces = [piece for _, piece in texts_of(rows)]
  # Two pieces of a document overlap by one token.
  expected = []
  for x in texts:
    ids = [256, *x.encode(), 256]
    for i in range(0, len(ids) - 1, 16):
      expected.append(tokenizers.Bytes().decode(ids[i : i + 17]))
  assert sorted(pieces) == sorted(expected)
  assert len(rows_of(batches)) == len(rows)  # a second pass
  config.eval.rows = 3
  assert len(rows_of(tasks.eval_batches(config, "test"))) == 3


def test_every_token_of_a_document_is_a_target_once(tmp_path):
  texts = documents(9)
  path = write(tmp_path / "a.jsonl", texts)
  config = make(**{"data.source": "kjv/train", "data.eval_source": path})
  count = 0
  for row in rows_of(tasks.eval_batches(config, "test")):
    same = row["segment"][1:] == row["segment"][:-1]
    count += (same & (row["token"][1:] >= 0)).sum()
  assert count == sum(len(x) + 1 for x in texts)  # 1 for the end of each


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_stopped_and_resumed_stream_is_the_same(name, tmp_path):
  path = write(tmp_path / name, documents(23))
  config = make(**{
    "data.source": path, "data.eval_source": path,
    "data.shuffle_window": 5, "data.packing_window": 3, "batch_size": 3,
  })  # fmt: skip
  data = tasks.train_batches(config)
  states, batches = [], []
  for _ in range(40):  # several epochs
    states.append(json.loads(json.dumps(data.get_state())))
    batches.append(next(data))
  for start in (1, 7, 18, 33):
    again = tasks.train_batches(config)
    again.set_state(states[start])
    for batch in batches[start : start + 5]:
      resumed = next(again)
      for name in batch:
        np.testing.assert_array_equal(resumed[name], batch[name])
  [first, other] = [
    next(tasks.train_batches(make(**{
      "data.source": path, "data.shuffle_window": 23, "seed": seed,
    })))["token"] for seed in (0, 1)
  ]  # fmt: skip
  assert (first != other).any()


def test_the_rows_of_long_documents_are_spread(tmp_path, monkeypatch):
  """Otherwise batches would come from one document, and training be worse."""
  folder = tmp_path / "texts"
  folder.mkdir()
  for letter in "abcdef":
    (folder / f"{letter}.txt").write_text(letter * 4000)  # 250 rows of 16
  config = make(**{
    "data.source": str(folder), "data.eval_source": str(folder),
    "data.shuffle_window": 100, "data.packing_window": 4, "batch_size": 16,
  })  # fmt: skip
  fewest = {}
  for characters in (text._SHUFFLED_CHARACTERS, 1):
    monkeypatch.setattr(text, "_SHUFFLED_CHARACTERS", characters)
    data = tasks.train_batches(config)
    states, rows = [], []
    for _ in range(70):
      states.append(json.loads(json.dumps(data.get_state())))
      rows.append(next(data)["token"])
    of_a_batch = [len(np.unique(x[(x >= 0) & (x < 256)])) for x in rows]
    fewest[characters] = min(of_a_batch)
    for start in (20, 60):
      again = tasks.train_batches(config)
      again.set_state(states[start])
      np.testing.assert_array_equal(next(again)["token"], rows[start])
  assert list(fewest.values()) == [4, 1]


def test_every_document_comes_once_an_epoch(tmp_path):
  texts = documents(23)
  path = write(tmp_path / "a.jsonl", texts)
  other = write(tmp_path / "b.jsonl", texts)
  config = make(**{
    "data.source": path, "data.eval_source": other, "data.shuffle_window": 7,
  })  # fmt: skip
  config.data.length = 64  # longer than any document
  data = tasks.train_batches(config)
  pieces = []
  while len(pieces) < 60:
    pieces += texts_of(rows_of([next(data)]))
  counts = [sum(x == y for _, y in pieces) for x in texts]
  assert set(counts) <= {1, 2, 3, 4}


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_documents_that_are_no_text_are_skipped_up_to_the_share(
  name, tmp_path, monkeypatch
):
  skipped = []
  monkeypatch.setattr(
    text_files.absl_logging,
    "warning",
    lambda line, *args: skipped.append(line % args),
  )
  texts = documents(20)
  bad = [*texts[:4], None, *texts[4:9], None, *texts[9:]]
  good, path = (
    write(tmp_path / folder / name, x)
    for folder, x in (("good", texts), ("bad", bad))
    if not (tmp_path / folder).mkdir()
  )
  values = {"data.shuffle_window": 5, "data.packing_window": 3}

  def take(source, **more):
    data = tasks.train_batches(
      make(**{"data.source": source, **values, **more})
    )
    return [next(data)["token"] for _ in range(20)]

  share = {"data.max_corrupt_share": 0.2}
  np.testing.assert_equal(take(path, **share), take(good))
  # The log names each once, although there are several epochs and a split that
  # is made of the same documents.
  list(tasks.eval_batches(make(**{"data.source": path, **share}), "test"))
  skipped = [x for x in skipped if x.startswith("skipped")]
  assert len(skipped) == 2

  def place(number):
    return (
      f"a.jsonl: line {number}" if "jsonl" in name else f"document {number}"
    )

  assert re.search(f"skipped: .*{place(5)}: ", skipped[0])
  assert re.search(f"skipped: .*{place(11)}: ", skipped[1])
  # With another training source, the whole of this one is evaluated.
  sources = {"data.source": "x/y", "data.eval_source": path, **share, **values}
  config = make(**sources)
  setup.validate_config(config)
  rows = rows_of(tasks.eval_batches(config, "test"))
  config.data.eval_source = good
  assert texts_of(rows) == texts_of(rows_of(tasks.eval_batches(config, "test")))
  said = (
    f"2 documents are corrupt, of the first 11; .* allows 1: .*{place(5)}: "
  )
  with pytest.raises(ValueError, match=f"{said}.*; .*{place(11)}: "):
    take(path, **{"data.max_corrupt_share": 0.1, "data.shuffle_window": 10})
  # At the end of an epoch the share is that of its documents.
  few = {"data.max_corrupt_share": 0.05, "data.shuffle_window": 1000}
  with pytest.raises(ValueError, match="of the first 22; .*=0.05 allows 1: "):
    take(path, **few)
  said = "must be text, not None.* --config.data.max_corrupt_share=0.1"
  with pytest.raises(ValueError, match=f"{place(5)}: .*{said}"):
    take(path)


def test_source_of_corrupt_documents_alone_is_refused(tmp_path):
  path = write(tmp_path / "a.jsonl", [None] * 3)
  config = make(**{"data.source": path, "data.max_corrupt_share": 1.0})
  with pytest.raises(ValueError, match="contains no documents"):
    next(tasks.train_batches(config))


def test_mixture_has_the_shares_it_was_told(tmp_path):
  a = write(tmp_path / "a.jsonl", ["a" * 40] * 50)
  b = write(tmp_path / "b.jsonl", ["b" * 10] * 50)
  config = make(batch_size=10)
  config.data.update(source="", mixture=((a, 0.7), (b, 0.3)), eval_source=a)
  setup.validate_config(config)
  data = tasks.train_batches(config)
  rows = np.concatenate([next(data)["token"] for _ in range(10)])
  assert ((rows == ord("a")).any(1).sum(), len(rows)) == (70, 100)


def test_processes_read_documents_of_their_own(tmp_path, monkeypatch):
  texts = documents(40)
  path = write(tmp_path / "a.jsonl", texts)
  config = make(**{"data.source": path, "data.eval_source": path})
  config.update_from_flattened_dict({"data.length": 64, "batch_size": 4})
  whole = rows_of(tasks.eval_batches(config, "test"))
  monkeypatch.setattr("jax.process_count", lambda: 2)
  seen, shares = [], []
  for process in range(2):
    monkeypatch.setattr("jax.process_index", lambda p=process: p)
    data = tasks.train_batches(config)
    batches = [next(data) for _ in range(3)]
    assert batches[0]["token"].shape == (2, 65)
    seen.append({piece for _, piece in texts_of(rows_of(batches))})
    shares.append(rows_of(tasks.eval_batches(config, "test")))
  assert not seen[0] & seen[1]
  assert sorted(texts_of(shares[0] + shares[1])) == sorted(texts_of(whole))


def test_sources_that_cannot_be_read_are_named(tmp_path):
  for source, said in (
    ("../no", "there is no such file or folder: choose"),
    ("./no", "there is no such file or folder: choose"),
    ("data/no", "no such file or folder here. If it is a name of the Hugging"),
  ):
    config = make(**{"data.source": source, "data.tokenizer": "characters"})
    with pytest.raises(ValueError, match=f"source='{source}'; .*{said}"):
      setup.validate_config(config)
  path = write(tmp_path / "a.jsonl", documents(3))
  with pytest.raises(ValueError, match=r"eval_source=None; must be given"):
    setup.validate_config(
      make(**{"data.source": "", "data.mixture": ((path, 1.0),)})
    )
  (tmp_path / "a.doc").write_text("x")
  doc = str(tmp_path / "a.doc")
  with pytest.raises(ValueError, match=r"a\.doc'; its name must end in"):
    setup.validate_config(make(**{"data.source": doc, "data.eval_source": doc}))
  config = make(**{"data.source": path, "data.eval_source": path})
  config.data.num_workers = 2
  with pytest.raises(ValueError, match="num_workers=2; must be 0"):
    setup.validate_config(config)
  config = make(**{"data.source": path, "data.text_column": "body"})
  with pytest.raises(ValueError, match=r"text_column='body'.*\['id', 'text'\]"):
    next(tasks.train_batches(config))
  (tmp_path / "b.jsonl").write_text("not json\n")
  config = make(**{"data.source": str(tmp_path / "b.jsonl")})
  with pytest.raises(
    ValueError,
    match=r"b\.jsonl: line 1 is not JSON: Expecting value: 'not json'",
  ):
    next(tasks.train_batches(config))


def test_a_broken_line_is_named_by_its_number(tmp_path):
  lines = [json.dumps({"text": x}) for x in documents(30)]
  path = tmp_path / "a.jsonl"
  for bad, said in (
    ('{"text": "broken', r"a\.jsonl: line 32 is not JSON: Unterminated string"),
    ("[1, 2]", r"line 32: must be an object with .*='text', not: \[1, 2\]"),
    ('{"a": 1}', r"line 32: has no column .*='text', only \['a'\]: "),
  ):
    path.write_text("\n".join([lines[0], "", *lines[1:], bad]))
    config = make(**{"data.source": "kjv/x", "data.eval_source": str(path)})
    with pytest.raises(ValueError, match=said):
      rows_of(tasks.eval_batches(config, "test"))


def test_an_empty_document_is_named(tmp_path, caplog):
  for i, content in enumerate(["a cat " * 99, "a dog " * 99, "", " "]):
    (tmp_path / f"{i}.txt").write_text(content)
  rows_of(tasks.eval_batches(make(**{"data.source": str(tmp_path)}), "test"))
  said = f"{tmp_path}/2.txt: is empty; such documents are left out"
  assert [x.getMessage() for x in caplog.records].count(said) == 1


def test_blank_documents_and_a_small_held_out_part_are_named(tmp_path, caplog):
  for i, content in enumerate(["a cat " * 901, "a dog", " \n", "\0 \0\0"]):
    (tmp_path / f"{i}.txt").write_text(content)
  config = make(**{"data.source": str(tmp_path), "data.length": 16})
  batches = tasks.eval_batches(config, "test")
  rows = rows_of(batches)
  warned = [x.getMessage() for x in caplog.records if x.levelname == "WARNING"]
  blank, few, share = (
    [x for x in warned if said in x]
    for said in ("has only blanks or NULs", "fewer than a row", "are held out")
  )
  assert len(blank) == len(few) == len(share) == 1
  assert blank[0].startswith(f"{tmp_path}/2.txt: ")
  assert "has 7 tokens, fewer than a row of config.data.length=16: " in few[0]
  assert "1 of 2 documents are held out, 0.1% of the characters: " in share[0]
  assert "give --config.data.eval_source" in share[0]
  assert texts_of(rows) == [(True, "a dog")]


def test_a_warning_about_a_folder_is_given_once_for_both_keys(tmp_path, caplog):
  (tmp_path / "a.csv").write_text("a,b")
  write(tmp_path / "a.jsonl", ["a"])
  for key in ("source", "eval_source"):
    text_files.find(str(tmp_path), key)
  [warning] = [x.getMessage() for x in caplog.records]
  assert warning.startswith(f"'{tmp_path}': these files of the folder are not")


# Other people's texts.


def fetched(config, batches):
  """The first training batches of a config."""
  data = tasks.train_batches(config)
  return [next(data) for _ in range(batches)]


def test_a_shuffle_window_ends_with_the_epoch(tmp_path, monkeypatch):
  """Otherwise one large document would be read repeatedly to fill a window."""
  [path] = [write(tmp_path / "a.jsonl", ["x" * 300_000])]
  other = write(tmp_path / "b.jsonl", ["x"])
  config = make(**{"data.source": path, "data.eval_source": other})
  config.data.shuffle_window = 10_000
  opened = []
  load = datasets.load_dataset
  monkeypatch.setattr(
    datasets, "load_dataset", lambda *a, **k: opened.append(a) or load(*a, **k)
  )
  next(tasks.train_batches(config))
  # It is opened once for a look, and once for each epoch that is prefetched.
  assert len(opened) < 6


def test_a_shuffle_window_ends_when_it_holds_much_text(tmp_path, monkeypatch):
  texts = documents(40)
  path = write(tmp_path / "a.jsonl", texts)
  monkeypatch.setattr(text, "_WINDOW_CHARACTERS", 100)
  blocks = iter(
    text._Blocks(text_documents.Origin(path, "train"), 10_000, seed=0)
  )
  pieces = []
  while len(pieces) < len(texts):
    texts_of_block = next(blocks).texts
    # The last one may exceed the bound.
    assert sum(map(len, texts_of_block)) < 100 + 60
    pieces += texts_of_block
  assert sorted(pieces) == sorted(texts)
  assert pieces != texts


def test_filling_a_window_shows_progress(tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(text_documents, "_SECONDS_BETWEEN_MESSAGES", 0)
  monkeypatch.setattr(
    text_documents._logger, "info", lambda line, *args: said.append(line % args)
  )
  path = write(tmp_path / "a.jsonl", documents(3))
  next(iter(text._Blocks(text_documents.Origin(path, "train"), 10, seed=0)))
  assert "a.jsonl" in said[-1]
  assert "3 of 10 documents" in said[-1]


def test_a_txt_is_one_text_with_its_newlines_and_an_end_held_out(tmp_path):
  path = tmp_path / "a.txt"
  lines = [f"line {i}, naïve" for i in range(400)]
  path.write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
  whole = "\n".join(lines)
  config = make(**{
    "data.source": str(path), "data.tokenizer": "characters",
    "data.vocab_size": 64,
  })  # fmt: skip
  setup.validate_config(config)
  decode = text.tokenizer(config).decode
  ids = np.concatenate([
    row["token"][1:] for row in rows_of(tasks.eval_batches(config, "test"))
  ])  # fmt: skip
  held_out = decode(ids[ids >= 0])
  assert whole.endswith(held_out)
  assert 0.04 < len(held_out) / len(whole) < 0.05
  rows = next(tasks.train_batches(config))["token"]
  assert all(decode(row) in whole[: -len(held_out)] for row in rows)
  config.data.lines = True  # now each line is a document
  config.data.length = 64
  pieces = [
    x for split in ("train", "test") for x in texts_in_characters(config, split)
  ]
  assert sorted(pieces) == sorted(lines)


def texts_in_characters(config, split):
  decode = text.tokenizer(config).decode
  for row in rows_of(tasks.eval_batches(config, split)):
    for segment in range(1, row["segment"].max() + 1):
      yield decode(row["token"][row["segment"] == segment])


def test_another_text_can_be_evaluated(tmp_path):
  for name, content in (("a.txt", "abcd" * 30), ("b.txt", "bad cab " * 10)):
    (tmp_path / name).write_text(content)
  b = write(tmp_path / "b.jsonl", ["bad cab"])
  for other, last in ((str(tmp_path / "b.txt"), "b "), (b, "ab")):
    config = make(**{
      "data.source": str(tmp_path / "a.txt"), "data.eval_source": other,
      "data.tokenizer": "characters", "batch_size": 1,
    })  # fmt: skip
    setup.validate_config(config)
    rows = rows_of(tasks.eval_batches(config, "test"))
    ids = rows[-1]["token"]
    assert text.tokenizer(config).decode(ids[ids >= 0]).endswith(last)


def test_splits_of_a_run_with_an_eval_source(tmp_path, caplog):
  """`train` is the split of the source, and no other name is made up."""
  caplog.set_level("INFO", "sigattn.data")
  many, plain = tmp_path / "many", tmp_path / "plain"
  for folder in (many, plain):
    folder.mkdir()
  trained, held_out = documents(9), [f"held {i}" for i in range(6)]
  good = write(tmp_path / "good.jsonl", held_out)
  sources = [write(many / "a.jsonl", trained), str(many)]
  for i, x in enumerate(held_out):
    (plain / f"{i}.txt").write_text(x)
  for source in sources:
    for other in (good, str(plain)):
      caplog.clear()
      text_files.inform_once.cache_clear()
      config = make(**{"data.source": source, "data.eval_source": other})
      config.data.length = 64
      setup.validate_config(config)
      found = {
        split: {
          x for _, x in texts_of(rows_of(tasks.eval_batches(config, split)))
        }
        for split in ("train", "test")
      }
      assert found == {"train": {*trained}, "test": {*held_out}}
      said = f"{other!r}: 6 of 6 documents are evaluated"
      assert caplog.messages.count(said) == 1
      with pytest.raises(ValueError, match=r"split='foo' .*'test', 'train'"):
        tasks.eval_batches(config, "foo")


def test_splits_of_a_run_on_one_text_with_an_eval_source(tmp_path, caplog):
  caplog.set_level("INFO", "sigattn.data")
  for name, content in (("a.txt", "abcd" * 30), ("b.txt", "bad cab " * 10)):
    (tmp_path / name).write_text(content)
  one, other = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
  for held_out in (other, write(tmp_path / "b.jsonl", ["bad cab"])):
    config = make(**{"data.source": one, "data.eval_source": held_out})
    config.update_from_flattened_dict({"data.length": 119, "batch_size": 1})
    [row] = rows_of(tasks.eval_batches(config, "train"))
    assert tokenizers.Bytes().decode(row["token"]) == "abcd" * 30
    for wrong in ("foo", "validation"):
      with pytest.raises(
        ValueError, match=f"split='{wrong}' of '.*b.*'test', "
      ):
        tasks.eval_batches(config, wrong)
  rows_of(tasks.eval_batches(make(**{
    "data.source": one, "data.eval_source": other,
  }), "test"))  # fmt: skip
  assert f"{other!r}: all 80 characters are evaluated" in caplog.text
  config.data.eval_split = "train"  # it would be trained on what it evaluates
  with pytest.raises(ValueError, match=r"eval_split='train'; must not be"):
    setup.validate_config(config)


def test_a_text_whose_end_is_one_character_is_refused(tmp_path):
  path, run = tmp_path / "a.txt", tmp_path / "run"
  path.write_text("a cat sat on a mat")  # 18 characters, of which 1 is held out
  config = make(**{"data.source": str(path), "batch_size": 1})
  with pytest.raises(
    ValueError, match=r"split='test' .* 1 tokens; must have 2"
  ):
    train(config, run)
  assert not run.exists()
  path.write_text("abc")
  text._whole.cache_clear()
  with pytest.raises(ValueError, match="length=16; .* 2, .*: give a longer te"):
    train(config, run)


def test_a_text_in_utf_16_is_to_be_converted_from_it(tmp_path):
  (tmp_path / "a.txt").write_text("a cat sat on a mat", encoding="utf-16")
  config = make(
    **{"data.source": str(tmp_path), "data.tokenizer": "characters"}
  )
  with pytest.raises(ValueError, match="byte 0, 0xff: .*iconv -f UTF-16 -t"):
    setup.validate_config(config)


def test_the_only_texts_are_named_if_they_are_not_utf_8(tmp_path):
  for i in range(3):
    (tmp_path / f"{i}.txt").write_bytes(f"café {i}".encode("latin1"))
  named = r"0\.txt: byte 3, 0xe9: is no text in UTF-8.*1\.txt: byte 3"
  for share in (0.0, 0.5):
    config = make(**{
      "data.source": str(tmp_path), "data.max_corrupt_share": share,
      "data.tokenizer": "characters",
    })  # fmt: skip
    with pytest.raises(ValueError, match=named):
      setup.validate_config(config)
  (tmp_path / "0.txt").write_text("good")
  (tmp_path / "2.txt").unlink()
  with pytest.raises(
    ValueError, match=r"two that differ.*1\.txt: byte 3, 0xe9"
  ):
    setup.validate_config(config)


def test_files_that_are_not_utf_8_are_named_and_skipped(tmp_path, monkeypatch):
  for i in range(4):
    (tmp_path / f"{i}.txt").write_text(f"naïve cat {i}")
  (tmp_path / "2.txt").write_bytes("café".encode("latin1"))
  (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "\xe9"}\n')
  skipped = []
  monkeypatch.setattr(
    text_files.absl_logging, "warning", lambda *x: skipped.append(x[-1])
  )
  origin = text_documents.Origin(str(tmp_path), "train")
  corrupt = text_documents.Corrupt(max_share=0.5, at_least=4)
  found = list(text_documents.DocumentIterator(origin, False, corrupt))
  assert found == ["naïve cat 0", "naïve cat 1", "naïve cat 3", "one"]
  assert [x.partition(": is no")[0] for x in skipped] == [
    f"skipped: {tmp_path / '2.txt'}: byte 3, 0xe9",
    f"skipped: {tmp_path / 'a.jsonl'}: line 2, 0xe9",
  ]
  for call in (
    lambda: list(text.documents(str(tmp_path), "train", "text")),
    lambda: text._whole(str(tmp_path / "2.txt")),
  ):
    with pytest.raises(ValueError, match=r"2\.txt: byte 3, 0xe9: .*iconv"):
      call()


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "folder"])
def test_a_stream_gets_a_held_out_part_without_a_second_file(
  name, tmp_path, monkeypatch
):
  texts = [f"document {i % 150}" for i in range(300)]  # each of them twice
  if name == "folder":
    (tmp_path / name).mkdir()
    write(tmp_path / name / "one.jsonl", texts)
    path = str(tmp_path / name)
  else:
    path = write(tmp_path / name, texts)
  config = make(**{"data.source": path, "data.length": 64})
  setup.validate_config(config)
  said = []  # as information, not as a warning
  monkeypatch.setattr(
    text_files._logger, "info", lambda line, *args: said.append(line % args)
  )
  train, test = (
    [x for _, x in texts_of(rows_of(tasks.eval_batches(config, split)))]
    for split in ("train", "test")
  )
  assert sorted(train + test) == sorted(texts)
  assert not set(train) & set(test)
  assert 2 <= len(test) <= 40
  [line] = said
  assert f"{len(test)} of {len(texts)} documents are held out" in line
  batches = fetched(config, 20)
  assert {x for _, x in texts_of(rows_of(batches))} <= set(train)


def test_of_a_few_documents_one_is_held_out(tmp_path):
  """Chance holds out none of most of these sets, and all of some."""
  sizes = set()
  for count in (2, 3, 10):
    for i in range(40):
      texts = [f"{i}: document {j}" for j in range(count)]
      path = write(tmp_path / f"{count}_{i}.jsonl", [*texts, texts[0]])
      train, test = ({*text.documents(path, x, "text")} for x in text._SPLITS)
      assert train | test == {*texts}
      assert train
      assert test
      assert not train & test
      sizes.add(len(test))
  assert sizes == {1, 2, 3}


def test_one_document_that_cannot_be_held_out_is_said(tmp_path):
  path = write(tmp_path / "a.jsonl", ["only one", "only one"])
  config = make(**{"data.source": path})
  with pytest.raises(
    ValueError, match=r"eval_split='test': contains no documents: .*eval_source"
  ):
    tasks.eval_batches(config, "test")


def test_a_folder_of_all_kinds_is_read_whole(tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(
    text_files.absl_logging,
    "warning",
    lambda line, *args: said.append(line % args),
  )
  folder = tmp_path / "my [best] texts"  # glob would read it as a pattern
  folder.mkdir()
  (folder / "a.txt").write_text("first\nsecond")
  (folder / "b.txt.gz").write_bytes(gzip.compress(b"third"))
  (folder / "c.pdf").write_text("no text")
  (folder / "g.md").write_text("# eighth")
  mixed = [
    {"body": "fourth", "id": 1},
    {"body": "fifth", "id": "x", "more": {}},
  ]
  (folder / "d.jsonl").write_text("\n\n".join(map(json.dumps, mixed)))
  (folder / "e.json").write_text(json.dumps([{"body": "sixth"}]))
  datasets.Dataset.from_dict({"body": ["seventh"], "n": [1]}).to_parquet(
    folder / "f.parquet"
  )
  other = write(tmp_path / "b.jsonl", [])
  config = make(**{
    "data.source": str(folder), "data.eval_source": other,
    "data.text_column": "body", "data.length": 64, "data.shuffle_window": 3,
  })  # fmt: skip
  config.data.eval_source = str(folder)
  config.data.eval_split = "train"
  expected = {
    "first\nsecond", "third", "fourth", "fifth", "sixth", "seventh", "# eighth",
  }  # fmt: skip
  read = {
    x
    for split in ("train", "test")
    for _, x in texts_of(rows_of(tasks.eval_batches(config, split)))
  }
  assert read == expected
  assert any("c.pdf" in line for line in said)
  data = tasks.train_batches(config)
  states, batches = [], []
  for _ in range(6):
    states.append(json.loads(json.dumps(data.get_state())))
    batches.append(next(data))
  data = tasks.train_batches(config)
  data.set_state(states[3])
  for batch in batches[3:]:
    np.testing.assert_array_equal(next(data)["token"], batch["token"])


def test_the_log_says_why_files_are_not_read(tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(text_files, "warn_once", said.append)
  for name in ("train.txt", "test.md", "a.md", "b.pdf", "README.md", ".c.txt"):
    (tmp_path / name).write_text(name)
  assert list(text_files.find(str(tmp_path))) == ["test", "train"]
  origin = text_documents.Origin(str(tmp_path), "test")
  assert list(text_documents.Documents(origin, False)) == ["test.md"]
  for part in (
    "1 with another ending than .json, .jsonl, .md, .parquet, .txt: b.pdf",
    "1 in no split, where the names of others make splits: a.md",
    "2 that are hidden, or describe a data set: .c.txt, README.md",
  ):
    assert part in said[0]


@pytest.mark.parametrize(
  ("names", "wanted"),
  [
    ("a.txt training.txt", {"train": "a.txt training.txt"}),
    ("a.txt evaluation.txt", {"train": "a.txt evaluation.txt"}),
    ("my_test.txt test-drive.txt", {"train": "my_test.txt test-drive.txt"}),
    ("a.txt latest.txt", {"train": "a.txt latest.txt"}),
    ("train.txt test.txt.gz a.txt", {"train": "train.txt", "test":
     "test.txt.gz"}),
    ("train_0.jsonl train_1.jsonl valid.json", {"train":
     "train_0.jsonl train_1.jsonl", "validation": "valid.json"}),
    ("train-00000-of-00002-0a1b.parquet test/x/a.txt", {"train":
     "train-00000-of-00002-0a1b.parquet", "test": "test/x/a.txt"}),
    ("c4-train.00000-of-01024.json.gz", {"train":
     "c4-train.00000-of-01024.json.gz"}),
    ("data/train_sft-00000-of-00003.parquet", {"train_sft":
     "data/train_sft-00000-of-00003.parquet"}),
  ],
)  # fmt: skip
def test_exact_names_make_splits(names, wanted, tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(text_files, "warn_once", said.append)
  for name in names.split():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  found = {
    split: {x for paths in kinds.values() for x in paths}
    for split, kinds in text_files.find(str(tmp_path)).items()
  }
  assert found == {
    split: {str(tmp_path / x) for x in paths.split()}
    for split, paths in wanted.items()
  }
  like_a_split = re.search(r"training|evaluation|my_test", names)
  assert bool(like_a_split) == any("not as a split" in x for x in said)


def test_the_file_that_makes_a_split_is_named(tmp_path):
  for name in ("a.txt", "b.txt", "test.txt"):
    (tmp_path / name).write_text("a text")
  said = r"choose from \['test'\].*test\.txt is named as a split; .*train_0"
  with pytest.raises(ValueError, match=said):
    setup.validate_config(make(**{"data.source": str(tmp_path)}))


def test_the_hub_is_not_told_of_local_files(tmp_path, monkeypatch):
  told = []
  monkeypatch.setattr(
    datasets.load, "get_session", lambda *_: told.append("a request")
  )
  path = write(tmp_path / "a.jsonl", documents(3))
  assert len(list(text.documents(path, "train", "text")))
  assert not told
  assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS


def test_empty_texts_are_no_documents(tmp_path):
  """See gpt-2-output-dataset issue 51. Blank lines of a .txt are also empty."""
  path = tmp_path / "a.txt"
  path.write_text("one\n\n  \ntwo\n")
  config = make(**{"data.source": "kjv/x", "data.eval_source": str(path)})
  config.data.lines = True
  rows = rows_of(tasks.eval_batches(config, "test"))
  assert sorted(x for _, x in texts_of(rows)) == ["one", "two"]


def test_files_with_other_columns_are_read(tmp_path):
  """datasets issue 7169 and mini_qwen issue 2: "column names don't match"."""
  for i, columns in enumerate(({"n": [1]}, {"m": ["x"]}, {})):
    datasets.Dataset.from_dict({"text": [f"text {i}"], **columns}).to_parquet(
      tmp_path / f"{i}.parquet"
    )
  (tmp_path / "3.jsonl").write_text('{"text": "text 3", "n": {"a": null}}')
  config = make(**{"data.source": "kjv/x", "data.eval_source": str(tmp_path)})
  config.data.update(train_split="x", eval_split="train")
  rows = rows_of(tasks.eval_batches(config, "train"))
  assert sorted(x for _, x in texts_of(rows)) == [f"text {i}" for i in range(4)]


def test_a_resumed_epoch_is_followed_by_whole_ones(tmp_path):
  """See litgpt issue 1712 and torchtitan pull request 3008."""
  texts = documents(24)
  for i in range(2):
    write(tmp_path / f"{i}.jsonl", texts[12 * i : 12 * (i + 1)])
  origin = text_documents.Origin(str(tmp_path), "train")
  documents_ = text_documents.DocumentIterator(origin, in_training=True)
  for _ in range(24 + 1 + 20):  # into the second file in the second epoch
    next(documents_)
  state = json.loads(json.dumps(documents_.get_state()))
  again = text_documents.DocumentIterator(origin, in_training=True)
  again.set_state(state)
  rest = [next(again) for _ in range(4 + 1 + 24 + 1)]
  assert rest[4] is rest[-1] is None
  assert sorted(rest[:4]) == sorted(texts[20:])
  assert sorted(rest[5:-1]) == sorted(texts)


def test_a_preset_does_not_ignore_the_source_that_is_given(tmp_path):
  path = tmp_path / "mine.txt"
  path.write_text("mine " * 100)
  config = lm.get_config("85m,runlocal")
  config.data.update(tokenizer="bytes", source=str(path))
  with pytest.raises(ValueError, match=r"mine\.txt'; must be '' with a config"):
    setup.validate_config(config)
  config.data.update(mixture=(), eval_source=str(path), eval_split="test")
  setup.validate_config(config)
  row = next(tasks.train_batches(config))["token"][0]
  assert "mine mine" in tokenizers.Bytes().decode(row)


def test_a_missing_evaluation_ends_the_start_and_names_key_and_split(tmp_path):
  path = write(tmp_path / "train.jsonl", documents(100))
  write(tmp_path / "validation.jsonl", documents(9))
  config = make(**{"data.source": str(tmp_path)})
  with pytest.raises(
    ValueError, match=r"eval_split='test'; .*\['train', 'validation'\]"
  ):
    train(config, tmp_path.parent / "run")
  empty = write(tmp_path / "empty.jsonl", [])
  config = make(**{"data.source": path, "data.eval_source": empty})
  with pytest.raises(
    ValueError,
    match=r"eval_source='.*empty\.jsonl', .*eval_split='test': contains no",
  ):
    train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_special_token_spelt_out_is_text(tmp_path):
  texts = ["the cat sat on the mat"] * 30
  trained = train_tokenizer.train(texts, 270)
  trained.save(str(tmp_path / "bpe.json"))
  bpe = tokenizers.File(tmp_path / "bpe.json", 270)
  [ids] = bpe.encode(["a<|endoftext|>b"])
  assert bpe.end not in ids
  assert bpe.decode(ids) == "a<|endoftext|>b"
