"""Transcripts, recordings, and the order of batches from buckets."""

import io
import json
import pickle

import jax
import numpy as np
import pyarrow.parquet
import pytest
import soundfile

from configs import speech as speech_config
from sigattn import tasks
from sigattn.data import loader
from sigattn.data import speech as data
from sigattn.training import setup
from tests.data.pictures import name_file
from tests.data.recordings import encode_audio, recording, small, write_folder
from train import train

ALPHABET = speech_config.get_config().data.alphabet


def test_no_transcript_is_in_both_splits():
  train_set, test_set = (
    data.open_source(small(), split) for split in ("train", "test")
  )
  assert (len(train_set), len(test_set)) == (485, 50)
  assert not set(train_set._texts) & set(test_set._texts)
  assert set("".join(train_set._texts)) == set(ALPHABET)


def test_transcript_keeps_the_alphabet():
  text = "  Caf\u00e9\u2014It\u2019s  twenty-one,\nOK? "
  assert data.transcript(text, ALPHABET) == "cafeit's twenty one ok"
  assert data.transcript("Ab c", "abA") == "Ab"


def test_unknown_character_is_refused():
  with pytest.raises(ValueError, match="text='a1'"):
    data.encode("a1", "abc")


@pytest.mark.parametrize("rate", [8000, 11025, 44100])
def test_read_averages_channels_and_resamples(rate):
  tone = np.sin(2 * np.pi * 500 * np.arange(rate) / rate)
  stereo = np.stack([0.6 * tone, 0.2 * tone], axis=1)
  audio_S = data.read(encode_audio(stereo, rate), 8000)
  assert audio_S.dtype == np.float32
  assert abs(len(audio_S) - 8000) <= 1
  expected = 0.4 * np.sin(2 * np.pi * 500 * np.arange(8000) / 8000)
  middle = slice(500, 7500)
  np.testing.assert_allclose(audio_S[middle], expected[middle], atol=4e-3)


def test_reads_local_parquet_at_any_rate(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
  rows = [(recording(0.5), "One."), (recording(1, 16000, 2), "TWO two")]
  values = write_folder(tmp_path, rows)
  config = small(**values, **{"data.bucket_seconds": (0.6, 1.2)})
  setup.validate_config(config)
  [first, second] = list(tasks.eval_batches(config, "train"))
  assert first["samples"][0] == 4000
  assert second["samples"][0] == 8000
  assert data.spell(second["target"][0], ALPHABET) == "two two"
  config = small(**values, **{"data.bucket_seconds": (0.6,)})
  assert take(config, 1)[0]["target"].shape == (1, 3)  # the other is too long
  with pytest.raises(ValueError, match="bucket_seconds.*1 of 2 recordings"):
    tasks.eval_batches(config, "train")


def test_unreadable_recording_is_named(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
  values = write_folder(tmp_path, [(recording(0.5), "a"), (b"no sound", "b")])
  with pytest.raises(ValueError, match="row 1, path='x'"):
    data.open_source(small(**values), "train")


# Other people's folders.


def spoken(config, split):
  """The transcripts and the seconds of a split."""
  source = data.open_source(config, split)
  return sorted(zip(source._texts, source._seconds.tolist(), strict=True))


@pytest.mark.parametrize("kind", ["struct", "bytes"])
def test_parquet_as_other_tools_write_it(kind, tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
  content = recording(0.5)
  audio = {"bytes": content, "path": "a.flac"} if kind == "struct" else content
  table = pyarrow.table({"audio": [audio], "text": ["One."]})
  for split in ("train", "test"):
    pyarrow.parquet.write_table(table, tmp_path / f"{split}.parquet")
  config = small(**{"data.source": str(tmp_path)})
  setup.validate_config(config)
  assert spoken(config, "train") == [("one", 0.5)]
  assert 4000 in take(config, 1)[0]["samples"]


def put(folder, **recordings):
  folder.mkdir(parents=True, exist_ok=True)
  for name, seconds in recordings.items():
    (folder / f"{name}.flac").write_bytes(recording(seconds))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "csv at the top"])
def test_folder_with_metadata(kind, tmp_path):
  for split, seconds in (("train", 0.5), ("test", 1.0)):
    put(tmp_path / split, a=seconds)
    rows = [{"file_name": "a.flac", "transcription": f"{split}, two"}]
    if kind == "csv at the top":
      continue
    table = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "csv":
      table = f'\ufefffile_name,transcription\r\na.flac,"{split}, two"\r\n'
    (tmp_path / split / f"metadata.{kind}").write_text(table)
  if kind == "csv at the top":
    (tmp_path / "metadata.csv").write_text(
      "file_name,transcription\n"
      'train/a.flac,"train, two"\ntest/./a.flac,"test, two"\n'
    )
  # See datasets issue 5046 for a path that begins with ./, and torchvision
  # issue 2831 for hidden files that operating systems create.
  for table in list(tmp_path.rglob("metadata.*")):
    table.write_text(table.read_text().replace("a.flac", "./a.flac"))
    (table.parent / f"._{table.name}").write_bytes(b"\x00\xff")
    hidden = table.parent / "__MACOSX"
    hidden.mkdir()
    (hidden / table.name).write_bytes(b"\x00\xff")
  config = small(**{"data.source": str(tmp_path)})
  setup.validate_config(config)
  assert spoken(config, "train") == [("train two", 0.5)]
  assert spoken(config, "test") == [("test two", 1.0)]
  assert take(config, 1)[0]["samples"].max() <= 4000 / 0.9 + 1


def test_the_layout_of_librispeech(tmp_path):
  for split, reader in (("train-clean-100", "19"), ("dev-clean", "84")):
    chapter = tmp_path / split / reader / "198"
    put(chapter, **{f"{reader}-198-0000": 0.5, f"{reader}-198-0001": 1.0})
    (chapter / f"{reader}-198.trans.txt").write_text(
      f"{reader}-198-0000 AN ABBEY\n{reader}-198-0001 IT'S {reader}\n"
    )
  config = small(**{
    "data.source": str(tmp_path), "data.train_split": "train-clean-100",
    "data.eval_split": "train-clean-100+dev-clean",
  })  # fmt: skip
  setup.validate_config(config)
  assert spoken(config, "train-clean-100") == [
    ("an abbey", 0.5), ("it's", 1.0),
  ]  # fmt: skip
  assert len(spoken(config, "train-clean-100+dev-clean")) == 4


def test_the_layout_of_common_voice(tmp_path):
  put(tmp_path / "clips", a=0.5, b=1.0)
  head = "client_id\tpath\tsentence\tage\n"
  for split, name in (("train", "a"), ("test", "b")):
    (tmp_path / f"{split}.tsv").write_text(
      f'{head}x\t{name}.flac\t"Quoted, {name}\t\n'
    )
  (tmp_path / "clip_durations.tsv").write_text("clip\tduration[ms]\na\t500\n")
  config = small(**{"data.source": str(tmp_path)})
  setup.validate_config(config)
  assert spoken(config, "test") == [("quoted b", 1.0)]
  config.data.eval_split = "validated"
  with pytest.raises(ValueError, match=r"eval_split='validated'.*'test', 'tra"):
    setup.validate_config(config)


def test_buckets_that_no_embedded_recording_fits_are_refused():
  config = small(**{"data.bucket_seconds": (0.05,)})
  with pytest.raises(ValueError, match=r"config\.data\.bucket_seconds=.*reach"):
    setup.validate_config(config)


def test_recordings_without_a_test_split_get_one(tmp_path):
  rows = [f"a.flac,number {i % 40}" for i in range(60)]
  put(tmp_path, a=0.5)
  table = tmp_path / "metadata.csv"
  table.write_text("\n".join(["file_name,text", *rows]))
  config = small(**{
    "data.source": str(tmp_path), "data.alphabet": " 0123456789bemnru",
  })  # fmt: skip
  setup.validate_config(config)
  train, test = ([x for x, _ in spoken(config, s)] for s in ("train", "test"))
  assert len(train) + len(test) == 60
  assert 2 <= len(test) <= 15
  assert not set(train) & set(test)
  table.write_text("file_name,text\na.flac,one\n")
  with pytest.raises(ValueError, match="of these 1 that leaves a split empty"):
    setup.validate_config(config)


def test_a_missing_recording_is_named_as_missing(tmp_path):
  put(tmp_path / "test", a=0.5)
  table = "file_name,text\ntest/a.flac,a\ntest/b.flac,b\n"
  (tmp_path / "metadata.csv").write_text(table)
  said = r"row 1, path='test/b\.flac': there is no file '.*/test/b\.flac'"
  with pytest.raises(ValueError, match=said):
    data.open_source(small(**{"data.source": str(tmp_path)}), "test")


def test_metadata_may_not_name_files_elsewhere(tmp_path):
  put(tmp_path, secret=0.5)
  folder = tmp_path / "folder"
  folder.mkdir()
  table = "file_name,text\ntest/../../secret.flac,a\n"
  (folder / "metadata.csv").write_text(table)
  config = small(**{"data.source": str(folder)})
  with pytest.raises(ValueError, match=r"lies outside of the source's folder"):
    data.open_source(config, "test")
  (folder / "metadata.csv").write_text("file,text\n../secret.flac,a\n")
  with pytest.raises(ValueError, match=r"needs a column file_name.*'file', 't"):
    setup.validate_config(config)


# Batches.


def take(config, count):
  iterator = tasks.train_batches(config)
  return [next(iterator) for _ in range(count)]


def equal(batches, others):
  for batch, other in zip(batches, others, strict=True):
    jax.tree.map(np.testing.assert_array_equal, batch, other)


def test_batch_is_of_one_bucket_and_holds_what_it_says():
  config = small(**{"augment.speeds": (0.5, 1.0), "batch_size": 2})
  source = data.open_source(config, "train")
  max_seconds = config.data.bucket_seconds
  seen_buckets = set()
  for batch in take(config, 12):
    size, length = batch["audio"].shape
    lengths = [int(seconds * 16000) + 1 for seconds in max_seconds]
    bucket_seconds = max_seconds[lengths.index(length)]
    seen_buckets.add(bucket_seconds)
    assert size == 2 * int(16 / bucket_seconds)
    assert batch["audio"].dtype == np.float32
    for row, samples, target, characters in zip(
      *(batch[k] for k in ("audio", "samples", "target", "characters")),
      strict=True,
    ):
      assert not row[samples:].any()
      assert not target[characters:].any()
      text = data.spell(target[:characters], ALPHABET)
      seconds = [
        s
        for s, t in zip(source._seconds, source._texts, strict=True)
        if t == text
      ]
      # A recording of this text has this length at one of the speeds.
      assert (
        min(abs(samples - 8000 * s / v) for s in seconds for v in (0.5, 1.0))
        < 10
      )
  assert seen_buckets == set(max_seconds)


def test_each_example_comes_once_an_epoch():
  config = small(batch_size=2)
  source = data.open_source(config, "train")
  order = loader._ShuffledBuckets(source, config)
  epochs = 5
  batches = [order[i] for i in range(order._first_batch(epochs))]
  counts = np.bincount(np.concatenate(batches), minlength=len(source))
  assert set(counts) <= {epochs - 1, epochs}
  assert (counts == epochs).mean() > 0.9
  for bucket in source.buckets:
    own = [b for b in batches if set(b) <= set(bucket)]
    flat = np.concatenate(own)
    for start in range(0, len(flat) - len(bucket) + 1, len(bucket)):
      part = flat[start : start + len(bucket)]
      assert sorted(part) == sorted(bucket)
  # The order mixes the buckets, and differs between epochs.
  first, second = (loader._bucket_order((9, 5), 0, e) for e in (0, 1))
  assert sorted(first) == sorted(second) == [0] * 9 + [1] * 5
  assert (first != second).any()
  assert len(set(first[:9])) > 1


def test_evaluation_has_every_example_once_and_pads_within_the_bucket():
  config = small(batch_size=2)
  source = data.open_source(config, "test")
  batches = list(tasks.eval_batches(config, "test"))
  assert sum(b["weight"].sum() for b in batches) == len(source)
  seconds = np.concatenate([b["seconds"][b["weight"] > 0] for b in batches])
  expected = np.sort(source._seconds.astype(np.float32))
  np.testing.assert_array_equal(np.sort(seconds), expected)
  for batch in batches:
    assert batch["audio"].shape[1] >= batch["samples"].max()


def test_processes_share_each_batch(monkeypatch):
  config = small(**{"batch_size": 2, "augment.speeds": (1.0,)})
  whole = take(config, 6)
  monkeypatch.setattr(loader.jax, "process_count", lambda: 2)
  for index in range(2):
    monkeypatch.setattr(loader.jax, "process_index", lambda i=index: i)
    share = [{k: x[index::2] for k, x in b.items()} for b in whole]
    equal(take(config, 6), share)


def test_resumes_bit_for_bit_where_it_was_saved():
  config = small()
  iterator = tasks.train_batches(config)
  for _ in range(5):
    next(iterator)
  state = iterator.get_state()
  expected = [next(iterator) for _ in range(6)]
  other = tasks.train_batches(config)
  other.set_state(state)
  equal([next(other) for _ in range(6)], expected)
  iterator.close()
  other.close()


def test_source_and_order_can_be_sent_to_a_worker():
  config = small()
  source = data.open_source(config, "train")
  order = loader._ShuffledBuckets(source, config)
  indices_B = order[0]
  unpickled = pickle.loads(pickle.dumps((source, order)))
  np.testing.assert_array_equal(unpickled[1][0], indices_B)
  rngs = (np.random.default_rng(0) for _ in range(2))
  batches = [s.train(indices_B, next(rngs)) for s in (source, unpickled[0])]
  equal(batches[:1], batches[1:])


def test_seed_decides_order_and_speeds():
  equal(take(small(), 3), take(small(), 3))
  first, other = take(small(), 3), take(small(seed=1), 3)
  assert any(
    a["target"].shape != b["target"].shape or (a["target"] != b["target"]).any()
    for a, b in zip(first, other, strict=True)
  )


@pytest.mark.parametrize(
  ("rate", "bad", "said"),
  [
    (1, 0.5, "1 samples per second in its header; must be from 1000"),
    (8000, float("nan"), "sample 7 is nan; must be finite"),
    (8000, float("-inf"), "sample 7 is -inf; must be finite"),
    (8000, 1e30, "sample 7 is 1.*e.30; must be finite"),
  ],
)
def test_recording_that_is_none_is_refused_by_name(
  rate, bad, said, tmp_path, hub_offline
):
  audio = np.full(16_000, 0.1, np.float32)
  audio[7] = bad
  file = io.BytesIO()
  soundfile.write(file, audio, rate, format="WAV", subtype="FLOAT")
  rows = [(recording(1), "a"), (file.getvalue(), "b")]
  config = small(**write_folder(tmp_path / "data", rows))
  config.augment.speeds = (1.0,)
  with pytest.raises(ValueError, match=f"row 1, path='x': .*{said}"):
    take(config, 3)
  file.seek(0)
  with pytest.raises(ValueError, match=said):
    data.read(file, 8000)


@pytest.mark.parametrize("path", ["/etc/hostname", "../secret.flac"])
def test_recording_outside_of_the_folder_is_not_opened(
  path, tmp_path, hub_offline
):
  values = write_folder(tmp_path / "data", [(recording(1), "a")])
  for parquet in (tmp_path / "data").glob("*.parquet"):
    name_file(parquet, "audio", path)
  (tmp_path / "secret.flac").write_bytes(recording(1))
  with pytest.raises(ValueError, match="row 0, .*lies outside of the source"):
    take(small(**values), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_recordings_are_skipped_up_to_the_share(
  workers, tmp_path, hub_offline, monkeypatch
):
  skipped = []
  monkeypatch.setattr(
    loader.logging, "warning", lambda line, *args: skipped.append(line % args)
  )
  cut = recording(1.1)
  rows = [(recording(seconds), "ab") for seconds in (1, 1.05, 1.15, 1.2)]
  rows.append((b"no recording", "a"))  # fails when its length is read
  rows.append((cut[:100] + bytes(len(cut) - 100), "b"))  # fails later
  values = write_folder(tmp_path / "data", rows)
  values |= {"data.max_corrupt_share": 0.4, "data.num_workers": workers}
  config = small(**values)
  batches = take(config, 8)
  assert {int(n) for b in batches for n in b["characters"]} == {2}
  assert len(skipped) == 2
  assert "row 4, path='x'" in skipped[0]
  assert "row 5, path='x'" in skipped[1]
  config.data.max_corrupt_share = 0.2
  with pytest.raises(ValueError, match=r"2 examples .*; .*row 4.*; .*row 5"):
    take(config, 8)
  if workers:  # Each call below would start new workers.
    return
  config.data.max_corrupt_share = 0.4
  equal(take(config, 8), batches)
  weights = [batch["weight"] for batch in tasks.eval_batches(config, "test")]
  assert np.concatenate(weights).sum() == 4
  config.data.max_corrupt_share = 0.0
  with pytest.raises(ValueError, match="row 4"):
    take(config, 1)


# Tokens have 30 ms, so a second has 33 of them.
LONG = "ab" * 16 + "c"


def test_recordings_that_are_too_short_for_their_transcripts_are_named(
  tmp_path, hub_offline, monkeypatch
):
  rows = [(recording(1), "ab"), (recording(1), LONG + "d")]
  rows += [(recording(1), LONG), (recording(1), LONG[:-1] + "b")]
  values = write_folder(tmp_path / "data", rows)
  said = (
    r"2 of 4 recordings are too short for their transcripts. The first is .*"
    r"row 1, path='x': the recording has 33 tokens, and CTC needs 34 for the "
    r"34 characters of the transcript"
  )
  with pytest.raises(ValueError, match=said):
    train(small(**values), tmp_path / "run")
  assert not (tmp_path / "run").exists()
  skipped = []
  monkeypatch.setattr(
    loader.logging, "warning", lambda line, *args: skipped.append(line % args)
  )
  config = small(**values, **{"data.max_corrupt_share": 0.5})
  batches = take(config, 12)
  # They are not in the batches, so they do not count in the mean loss. What is
  # too short only at a higher speed is played as it was recorded.
  assert {int(n) for b in batches for n in b["characters"]} == {2, 33}
  for batch in batches:
    assert (data.tokens(config, batch["samples"]) >= batch["characters"]).all()
  assert ["row 1" in skipped[0], "row 3" in skipped[1]] == [True, True]
  assert "needs 34 for the 33 characters" in skipped[1]
  weights = [batch["weight"] for batch in tasks.eval_batches(config, "test")]
  assert np.concatenate(weights).sum() == 2


def test_recording_that_is_shorter_than_its_header_says_is_too_short(
  tmp_path, hub_offline, monkeypatch
):
  """Decoding ends early, as that of some damaged files does."""
  values = write_folder(tmp_path / "data", [(recording(1), LONG)])
  whole = data.read
  monkeypatch.setattr(data, "read", lambda *args: whole(*args)[:4000])
  with pytest.raises(ValueError, match="row 0.* has 16 tokens, and CTC needs"):
    take(small(**values, **{"augment.speeds": (1.0,)}), 1)
