"""Speech: features, CTC, the encoder, bucketed batches, transcribing."""

import copy
import functools
import io
import itertools
import pathlib
import pickle
import subprocess
import sys

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx

from configs import speech as speech_config
from configs import speech_sigmoid
from eval import evaluate
from sigattn import positions, tasks, validate
from sigattn.data import loader, log_mel
from sigattn.data import speech as data
from sigattn.inference.transcribe import transcribe
from sigattn.tasks import ctc, speech
from sigattn.training import setup
from train import train

ROOT = pathlib.Path(__file__).parents[2]
KEY = jax.random.key(0)
ALPHABET = speech_config.get_config().data.alphabet


def small(**values):
  """Width 16, one layer, one bucket."""
  config = speech_sigmoid.get_config("runlocal")
  config.model.depth = 1
  config.update_from_flattened_dict(values)
  return config


# Features.


@pytest.mark.parametrize("rate", [8000, 16000])
def test_log_mel_is_librosas(rate):
  # librosa itself (1.0.0) would bring numba and scikit-learn; the file holds
  # log(max(mel, 1e-6)) of librosa.feature.melspectrogram(y, sr=rate, n_fft,
  # win_length=rate // 40, hop_length=rate // 100, center=False, n_mels=80),
  # y the audio within (n_fft - win_length) / 2 zeros, n_fft = 512 or 1024.
  expected = np.load(ROOT / "tests" / "data" / "librosa_mel.npz")[str(rate)]
  time = np.arange(rate // 4) / rate
  chirp = np.sin(2 * np.pi * (200 + 0.4 * rate * time) * time)
  audio_S = (0.3 * chirp * np.exp(-8 * time)).astype(np.float32)
  features_TM = log_mel.log_mel(audio_S[None], rate, 80)[0]
  assert (
    features_TM.shape == (log_mel.frames(len(audio_S), rate), 80) == (23, 80)
  )
  assert np.ptp(expected) > 8
  np.testing.assert_allclose(features_TM, expected, atol=2e-4)


def test_digital_silence_is_finite():
  features_BTM = log_mel.log_mel(np.zeros((1, 800), np.float32), 8000, 80)
  np.testing.assert_allclose(features_BTM, np.log(1e-6), rtol=1e-6)


def noise(*shape, seed=0):
  return np.random.default_rng(seed).normal(1, 3, shape).astype(np.float32)


def test_normalised_over_the_frames_that_are_no_padding():
  x_BTM = noise(2, 30, 5)
  normalized_BTM = np.asarray(log_mel.normalize(x_BTM, jnp.array([30, 11])))
  for row, length in zip(normalized_BTM, (30, 11), strict=True):
    assert row[:length].mean() == pytest.approx(0, abs=1e-5)
    assert row[:length].std() == pytest.approx(1, abs=1e-3)
    assert (row[length:] == 0).all()


def test_spec_augment_hides_bands_of_the_widths_it_is_told():
  augment = small().augment
  augment.update(
    freq_masks=1, freq_width=4, time_masks=1, time_width=6, time_share=0.5
  )
  frames_B = np.tile([8, 20], 200)
  x_BTM = np.ones((400, 20, 10), np.float32)
  masked_BTM = np.asarray(log_mel.spec_augment(augment, KEY, x_BTM, frames_B))
  hidden_BT, hidden_BM = (masked_BTM == 0).all(2), (masked_BTM == 0).all(1)
  # Bands of time and of frequency, and nothing else.
  bands = hidden_BT[:, :, None] | hidden_BM[:, None]
  np.testing.assert_array_equal(masked_BTM == 0, bands)
  count_B, bins_B = hidden_BT.sum(1), hidden_BM.sum(1)
  assert set(count_B[frames_B == 8]) == set(range(5))  # half of it
  assert set(count_B[frames_B == 20]) == set(range(7))
  assert not hidden_BT[frames_B == 8, 8:].any()
  assert set(bins_B) == set(range(5))
  changes_BT = np.diff(hidden_BT.astype(int), prepend=0, append=0)
  assert (abs(changes_BT).sum(1) == 2 * (count_B > 0)).all()  # one run
  assert hidden_BT[frames_B == 20].any(0).all()  # anywhere
  augment.update(freq_masks=0, time_masks=0)
  same = log_mel.spec_augment(augment, KEY, x_BTM, frames_B)
  np.testing.assert_array_equal(same, x_BTM)


# Positions.


def test_cape_without_rng_is_centred_on_what_is_no_padding():
  positions_BT = positions.cape(None, jnp.array([4, 7]), 7, 5.0, 0.5, 1.5)
  np.testing.assert_allclose(positions_BT[0], np.arange(7) - 1.5)
  np.testing.assert_allclose(positions_BT[1], np.arange(7) - 3)


def test_cape_shifts_and_scales_within_its_limits():
  lengths_B = jnp.full((2000,), 8)
  plain = np.arange(8) - 3.5

  def draw(*limits):
    positions_BT = positions.cape(KEY, lengths_B, 8, *limits)
    return np.asarray(positions_BT)

  shift = draw(5.0, 0.0, 1.0) - plain
  np.testing.assert_allclose(np.ptp(shift, axis=1), 0, atol=1e-5)
  assert -5 <= shift.min() < -4.9
  assert 4.9 < shift.max() <= 5
  local = draw(0.0, 0.5, 1.0) - plain
  assert 0.49 < abs(local).max() <= 0.5
  assert abs(np.corrcoef(local[:, 0], local[:, 1])[0, 1]) < 0.1
  scale = draw(0.0, 0.0, 2.0) / plain
  np.testing.assert_allclose(np.ptp(scale, axis=1), 0, atol=1e-5)
  logs = np.log2(scale[:, 0])
  assert -1 <= logs.min() < -0.99
  assert 0.99 < logs.max() <= 1
  assert abs(logs.mean()) < 0.05


def test_sincos_of_whole_positions_is_the_table():
  table_BTD = positions.sincos(jnp.arange(5.0)[None], 6)
  np.testing.assert_allclose(table_BTD[0], positions.sincos_1d(5, 6), atol=1e-6)


# CTC.


@pytest.mark.parametrize(
  ("path", "text"),
  [
    ([], ""),
    ([0, 0], ""),
    ([1, 1, 0, 1, 2, 2, 0, 3], "aabc"),
    ([2, 0, 0, 2], "bb"),
  ],
)
def test_greedy_merges_then_drops_blanks(path, text):
  assert ctc.greedy(path, "abc") == text


def log_probs(frames, classes, seed=0):
  x = np.random.default_rng(seed).normal(0, 2, (frames, classes))
  return x - np.log(np.exp(x).sum(1, keepdims=True))


def by_paths(log_probs_TV):
  """{text: log probability} from the sum over all paths."""
  frames, classes = log_probs_TV.shape
  log_prob_of = {}
  for path in itertools.product(range(classes), repeat=frames):
    text = ctc.greedy(path, "abc")
    log_prob = log_probs_TV[np.arange(frames), path].sum()
    log_prob_of[text] = np.logaddexp(log_prob_of.get(text, -np.inf), log_prob)
  return log_prob_of


def test_prefix_beam_finds_the_most_probable_text():
  differs = 0
  for seed in range(20):
    x_TV = 0.3 * log_probs(5, 3, seed)
    x_TV -= np.log(np.exp(x_TV).sum(1, keepdims=True))
    texts = by_paths(x_TV)
    text = ctc.prefix_beam(x_TV, "abc", 100)
    assert texts[text] == pytest.approx(max(texts.values()))
    differs += text != ctc.greedy(x_TV.argmax(1), "abc")
  assert differs > 5
  assert ctc.prefix_beam(log_probs(0, 3), "abc", 4) == ""


def test_ctc_loss_is_the_sum_over_paths_of_what_is_no_padding():
  texts = ["ab", "aa", "", "bb", "c"]
  tokens = np.array([5, 4, 3, 3, 0], np.int32)
  logits = np.stack([log_probs(5, 4, seed) for seed in range(5)])
  targets = np.zeros((5, 3), np.int32)
  for row, text in zip(targets, texts, strict=True):
    row[: len(text)] = data.encode(text, "abc")
  characters = np.array([len(text) for text in texts], np.int32)
  targets[3, 2] = 2  # in the padding, as if it were repeated
  loss_B = speech.ctc_loss(np.float32(logits), tokens, targets, characters)
  for i in range(4):
    expected = -by_paths(logits[i, : tokens[i]])[texts[i]]
    assert loss_B[i] == pytest.approx(expected, rel=1e-4)
  assert loss_B[4] == 0  # no token for a character


def test_too_few_tokens_for_a_double_letter_give_no_gradient():
  targets, characters = np.array([[1, 1]]), np.array([2])

  @jax.jit
  @jax.grad
  def gradient(logits_BTV, tokens):
    return speech.ctc_loss(
      logits_BTV, jnp.array([tokens]), targets, characters
    ).sum()

  for tokens, is_zero in ((2, True), (3, False)):
    grad_BTV = gradient(jnp.zeros((1, 3, 3)), tokens)
    assert np.isfinite(grad_BTV).all()
    assert (grad_BTV == 0).all() == is_zero


def test_errors_count_edits():
  counts = ctc.errors("press two now", "pres tow now")
  expected = dict(zip(ctc.COUNTS, (1 + 2, 13, 2, 3), strict=True))
  assert counts == expected
  assert ctc.errors("", "a")["characters"] == 0


def test_unknown_character_is_refused():
  with pytest.raises(ValueError, match="text='a1'"):
    data.encode("a1", "abc")


# The encoder.


def fill(config):
  """The model with random parameters, its head too; fast to make."""
  shapes = nnx.eval_shape(lambda: speech.build(config, nnx.Rngs(0)))
  graphdef, shapes = nnx.split(shapes)
  rng = np.random.default_rng(0)
  draw = functools.partial(rng.normal, 0.0, 0.3)
  return graphdef, jax.tree.map(lambda x: jnp.float32(draw(x.shape)), shapes)


def make_batch(seconds=(0.5, 0.2), length=0.6, characters=(5, 2)):
  rng = np.random.default_rng(1)
  return {
    "audio": rng.normal(0, 0.1, (2, int(length * 8000))).astype(np.float32),
    "samples": np.array([int(s * 8000) for s in seconds], np.int32),
    "target": rng.integers(1, 29, (2, 6), np.int32),
    "characters": np.array(characters, np.int32),
    "seconds": np.array(seconds, np.float32),
    "weight": np.ones(2, np.float32),
  }


@pytest.mark.parametrize(
  "values",
  [
    {"attn.alibi": True, "model.convolutions": ((7, 3), (4, 2))},
    {"attn.kind": "softmax", "model.positions": "cape"},
    {"model.positions": "rope", "attn.alibi": False},
  ],
  ids=str,
)
def test_padding_changes_nothing(values):
  config = small(**values)
  graphdef, state = fill(config)

  @jax.jit
  def run(state, batch):
    return nnx.merge(graphdef, state)(*speech.log_mel_of(config, batch))

  batch = make_batch()
  logits_BTV, tokens_B = run(state, batch)
  for i, samples in enumerate(batch["samples"]):
    alone = {
      "audio": batch["audio"][i : i + 1, :samples],
      "samples": batch["samples"][i : i + 1],
    }
    expected, [tokens] = run(state, alone)
    assert tokens == tokens_B[i] == expected.shape[1]
    logits_TV = logits_BTV[i, :tokens]
    np.testing.assert_allclose(logits_TV, expected[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["none", "sincos", "rope"])
def test_positions_tell_the_order_where_alibi_tells_distances_alone(name):
  # A convolution of one frame has no order of its own.
  values = {"model.positions": name, "model.convolutions": ((1, 1),)}
  config = small(**values, **{"attn.alibi": True, "attn.logit_bias": 0.0})
  graphdef, state = fill(config)

  @jax.jit
  def run(state, x_BTM):
    return nnx.merge(graphdef, state)(x_BTM, jnp.array([12]))[0]

  x_BTM = noise(1, 12, 80)
  logits_BTV = run(state, x_BTM)
  mirrored_BTV = run(state, x_BTM[:, ::-1])[:, ::-1]
  same = np.allclose(logits_BTV, mirrored_BTV, rtol=1e-3, atol=1e-4)
  assert same == (name == "none")


@pytest.mark.parametrize(
  "values",
  [
    {"model.positions": "cape", "model.norm": "hybrid", "dtype": "bfloat16"},
    {"attn.kind": "softmax", "model.norm": "post", "model.remat": True},
  ],
  ids=str,
)
def test_every_parameter_has_a_finite_gradient(values):
  config = small(**values)
  validate.fields(config, speech.FIELDS, speech.RULES)
  graphdef, state = fill(config)

  @functools.partial(jax.grad, has_aux=True)
  def gradients(state):
    return speech.loss(config, nnx.merge(graphdef, state), make_batch(), KEY)

  grads, metrics = jax.jit(gradients)(state)
  for path, x in nnx.to_flat_state(grads):
    assert np.isfinite(x).all(), path
    assert path[-2:] == ("key", "bias") or abs(x[...]).max() > 0, path
  assert metrics.keys() == {"loss"}


def test_first_loss_is_that_of_equal_probabilities():
  config = small(**{"augment.time_masks": 0, "augment.freq_masks": 0})
  params = jax.tree.map(np.asarray, setup.init(config)[1])
  assert not params["head"]["kernel"].any()
  batch = make_batch(characters=(1, 1))
  static = setup.graphdef(config)

  @jax.jit
  def loss(params):
    return speech.loss(config, nnx.merge(static, params), batch, KEY)[0]

  tokens_B = [-(-log_mel.frames(s, 8000) // 3) for s in batch["samples"]]
  # A character anywhere, of any length, and blanks: T (T + 1) / 2 paths.
  expected = [t * np.log(29) - np.log(t * (t + 1) / 2) for t in tokens_B]
  assert loss(params) == pytest.approx(np.mean(expected), rel=1e-4)


def test_n_is_the_tokens_of_the_longest_utterance():
  config = small(**{"data.bucket_seconds": (1.0, 16.0)})
  model = nnx.eval_shape(lambda: speech.build(config, nnx.Rngs(0)))
  assert model.encoder.blocks.attn.max_length == -(-(1600 - 2) // 3)


def test_decode_searches_with_the_width_of_the_config():
  x_TV = 0.3 * log_probs(5, 3, 3)
  x_TV -= np.log(np.exp(x_TV).sum(1, keepdims=True))
  # Padding after it, of another text.
  outputs = {"tokens": 5, "log_probs": np.append(x_TV, x_TV, axis=0)}
  config = small(**{"eval.beam_width": 50, "data.alphabet": "ab"})
  assert speech.decode(config, outputs) == ctc.prefix_beam(x_TV, "ab", 50)
  outputs = {"tokens": 3, "path": np.array([1, 0, 2, 2, 1])}
  config.eval.beam_width = 1
  assert speech.decode(config, outputs) == "ab"


def test_score_and_results_sum_over_utterances_and_by_length():
  config = small()
  texts = ["press two", "no", "star", "x"]
  hypotheses = ["pres two", "", "star", "y"]
  rows = [data.encode(" ".join(text), ALPHABET) for text in hypotheses]
  outputs = {
    "target": data._padded([data.encode(t, ALPHABET) for t in texts], 9, int),
    "characters": np.array([len(text) for text in texts]),
    "seconds": np.array([3.0, 10.0, 31.0, 5.0]),
    "weight": np.array([1, 1, 1, 0]),
    "loss": np.array([9.0, 2.0, 4.0, 100.0]),
    "tokens": np.array([len(row) for row in rows]),
    "path": data._padded(rows, 20, int),
  }
  # A blank between the letters, not the space that joined them.
  spaces = outputs["path"] == ALPHABET.index(" ") + 1
  places = np.arange(20) % 2 == 1
  outputs["path"] = np.where(spaces & places[None], ctc.BLANK, outputs["path"])
  results = speech.results(config, speech.score(config, outputs))
  assert results == pytest.approx(
    {
      "loss": 15 / 15,
      "cer": 3 / 15, "cer_0_10": 1 / 9, "cer_10_20": 1.0, "cer_30_up": 0.0,
      "wer": 2 / 4, "wer_0_10": 1 / 2, "wer_10_20": 1.0, "wer_30_up": 0.0,
    }
  )  # fmt: skip


# The data.


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


def file(audio, rate, kind="WAV"):
  content = io.BytesIO()
  soundfile.write(content, audio, rate, format=kind)
  content.seek(0)
  return content


@pytest.mark.parametrize("rate", [8000, 11025, 44100])
def test_read_averages_channels_and_resamples(rate):
  tone = np.sin(2 * np.pi * 500 * np.arange(rate) / rate)
  stereo = np.stack([0.6 * tone, 0.2 * tone], axis=1)
  audio_S = data.read(file(stereo, rate), 8000)
  assert audio_S.dtype == np.float32
  assert abs(len(audio_S) - 8000) <= 1
  expected = 0.4 * np.sin(2 * np.pi * 500 * np.arange(8000) / 8000)
  middle = slice(500, 7500)
  np.testing.assert_allclose(audio_S[middle], expected[middle], atol=4e-3)


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
      # One of the recordings of this text, at one of the speeds.
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
  # The buckets come in turn, in another order each epoch.
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


def folder(path, rows):
  table = datasets.Dataset.from_list(
    [
      {"audio": {"bytes": content, "path": "x"}, "text": text}
      for content, text in rows
    ]
  ).cast_column("audio", datasets.Audio(decode=False))
  for split in ("train", "test"):
    table.to_parquet(path / f"{split}.parquet")
  return {"data.source": str(path)}


def recording(seconds, rate=8000, channels=1):
  audio = noise(int(seconds * rate), channels) / 20
  return file(np.clip(audio, -1, 1), rate, "FLAC").getvalue()


def test_reads_local_parquet_at_any_rate(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
  rows = [(recording(0.5), "One."), (recording(1, 16000, 2), "TWO two")]
  values = folder(tmp_path, rows)
  config = small(**values, **{"data.bucket_seconds": (0.6, 1.2)})
  setup.validate_config(config)
  [first, second] = list(tasks.eval_batches(config, "train"))
  assert first["samples"][0] == 4000
  assert second["samples"][0] == 8000
  assert data.spell(second["target"][0], ALPHABET) == "two two"
  config = small(**values, **{"data.bucket_seconds": (0.6,)})
  assert take(config, 1)[0]["target"].shape == (1, 3)  # one is too long
  with pytest.raises(ValueError, match="bucket_seconds.*1 of 2 recordings"):
    tasks.eval_batches(config, "train")


def test_unreadable_recording_is_named(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
  values = folder(tmp_path, [(recording(0.5), "a"), (b"no sound", "b")])
  with pytest.raises(ValueError, match="row 1, path='x'"):
    data.open_source(small(**values), "train")


# From training to text.


def test_trains_evaluates_and_transcribes(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
  (tmp_path / "data").mkdir()
  rows = [(recording(0.5), "one"), (recording(0.7), "two")]
  values = folder(tmp_path / "data", rows)
  config = small(**values, **{"data.bucket_seconds": (1.0,)})
  state = train(config, tmp_path / "run")
  start = setup.init(config)[1]
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, start)
  assert all(jax.tree.leaves(moved["head"]))
  results = evaluate(tmp_path / "run")
  assert {"loss", "cer", "wer", "cer_0_10", "wer_0_10"} <= results.keys()
  audio = noise(8000) / 20
  files = [tmp_path / "a.wav", tmp_path / "b.wav"]
  soundfile.write(files[0], audio, 8000, subtype="FLOAT")
  stereo = np.stack([audio, audio], axis=1)
  soundfile.write(files[1], stereo, 8000, subtype="FLOAT")
  texts = list(transcribe(tmp_path / "run", files))
  assert texts[0] == texts[1]
  (tmp_path / "empty.wav").write_bytes(file(np.zeros(0), 8000).getvalue())
  (tmp_path / "text.wav").write_text("no sound")
  for name, message in [
    ("none.wav", "no such file"),
    ("text.wav", "cannot be read"),
    ("empty.wav", "holds no sound"),
  ]:
    with pytest.raises(ValueError, match=rf"{name}: {message}"):
      next(transcribe(tmp_path / "run", [files[0], tmp_path / name]))
  done = subprocess.run(
    [
      sys.executable, "-m", "sigattn", "transcribe",
      f"--workdir={tmp_path / 'run'}", *files,
    ],
    cwd=ROOT, capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert done.stdout == f"{texts[0]}\n{texts[1]}\n"


# Configs.


ARGS = (
  None, "gpu", "runlocal", "librispeech", "100h", "librispeech,960h,runlocal",
)  # fmt: skip


@pytest.mark.parametrize("arg", ARGS)
def test_config_passes_its_check_and_differs_by_the_kind_alone(arg):
  for module in (speech_config, speech_sigmoid):
    config = module.get_config(arg)
    assert config.is_locked
    if config.data.source != "spoken_prompts":
      # All but the data: there is no Hub in a test.
      config = copy.deepcopy(config)
      config.data.update(
        source="spoken_prompts", train_split="train", eval_split="test"
      )
    setup.validate_config(config)
  softmax, sigmoid = (
    module.get_config(arg) for module in (speech_config, speech_sigmoid)
  )
  sigmoid.attn.kind = "softmax"
  assert sigmoid == softmax


def test_librispeech_encoder_is_the_papers():
  config = speech_config.get_config("librispeech")
  model = nnx.eval_shape(lambda: speech.build(config, nnx.Rngs(0)))
  kernels = [
    x.size
    for path, x in nnx.to_flat_state(nnx.state(model.encoder))
    if path[-1] == "kernel"
  ]
  assert sum(kernels) == 36 * 12 * 768**2


@pytest.mark.parametrize("arg", ["librispech", "100h,960h", "gpu,100h", "h200"])
def test_bad_argument_is_refused(arg):
  with pytest.raises(ValueError, match=f"configs/speech.py:{arg}"):
    speech_config.get_config(arg)


BAD = [
  ("model.width", 15),
  ("model.mel_bins", 0),
  ("model.convolutions", ((7,),)),
  ("model.positions", "learned"),
  ("model.cape_scale", 0.5),
  ("augment.speeds", (1.1, 0.9)),
  ("augment.speeds", (0.333,)),
  ("augment.time_masks", -1),
  ("augment.time_share", 1.5),
  ("eval.beam_width", 0),
  ("ckpt.best_metric", "accuracy"),
  ("data.source", "spoken_prompt"),
  ("data.train_split", "train+dev"),
  ("data.eval_split", "validation"),
  ("data.sample_rate", 0),
  ("data.alphabet", "aba"),
  ("data.bucket_seconds", ()),
  ("data.bucket_seconds", (4.0, float("inf"))),
]


@pytest.mark.parametrize(
  ("path", "value"), BAD, ids=[f"{path}={value}" for path, value in BAD]
)
def test_bad_value_is_refused_with_its_path_and_value(path, value):
  config = speech_sigmoid.get_config()
  config.update_from_flattened_dict({path: value})
  with pytest.raises(ValueError, match=rf"config\.{path}") as error:
    setup.validate_config(config)
  assert repr(value) in str(error.value)
