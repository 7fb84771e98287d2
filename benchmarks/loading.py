"""Measures the loaders: python -m benchmarks.loading

It measures the examples per second of each task's training loader. It needs no
GPU. The tasks are:

  image   JPEGs of 500 x 375 pixels, cropped to 224, flipped, with RandAugment,
          as in configs/vit.py:imagenet
  text    documents that our byte-level BPE splits into tokens; the loader packs
          them into rows of 4,096, as in configs/lm.py:85m, always in one
          process
  speech  recordings of 15 seconds at 16 kHz in FLAC, as in
          configs/speech.py:librispeech

Beside each rate it prints the rate at which a GPU trains: that of the fastest
of our rows in a file that benchmarks/train_step.py wrote. The files are made
from the embedded data sets in a temporary folder. It writes
benchmarks/results/loading.json.

  python -m benchmarks.loading --workers 0 16 \\
    --step benchmarks/results/train_step_nvidia_h200.json
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import pathlib
import tempfile
import time

import numpy as np

from sigattn import extras

_FOLDER = pathlib.Path(__file__).parent / "results"
# {task: (unit, models of train_step that train on it, name of their rate)}
TASKS = {
  "image": ("images", ("vit_b16",), "images_per_second"),
  "text": ("tokens", ("85m", "1b"), "tokens_per_second"),
  "speech": ("utterances", ("speech",), "utterances_per_second"),
}


def _pictures(folder, count):
  """Saves JPEGs of about 90 kB in two classes: smooth colours and grain."""
  from PIL import Image

  rng = np.random.default_rng(0)
  for split, files in (("train", count), ("test", 2)):
    for i in range(files):
      small = rng.integers(0, 256, (12, 16, 3), np.uint8)
      picture = Image.fromarray(small).resize(
        (500, 375), Image.Resampling.BICUBIC
      )
      grain = rng.normal(0, 12, (375, 500, 3))
      pixels = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
      path = folder / split / "ab"[i % 2] / f"{i}.jpg"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(pixels).save(path, quality=90)


def _image(folder, count):
  from configs import vit

  _pictures(folder, count)
  config = vit.get_config("imagenet").copy_and_resolve_references().unlock()
  config.data.update(source=str(folder), eval_split="test", num_classes=2)
  config.batch_size = 128
  return config


def _text(folder, count):
  from configs import lm
  from sigattn.data import text, train_tokenizer

  verses = list(text.documents("kjv", "train", "text"))
  tokenizer = train_tokenizer.train(verses, 8192)
  tokenizer.save(str(folder / "bpe.json"))
  whole = "\n".join(verses)
  rng = np.random.default_rng(0)
  with (folder / "train.jsonl").open("w") as file:
    for _ in range(40 * count):  # each as long as a web page
      start = rng.integers(len(whole) - 20_000)
      length = int(rng.exponential(3000)) + 100
      file.write(json.dumps({"text": whole[start : start + length]}) + "\n")
  config = lm.get_config("85m").copy_and_resolve_references().unlock()
  config.data.update(
    source=str(folder),
    mixture=(),
    eval_source=None,
    eval_split="train",
    tokenizer=str(folder / "bpe.json"),
  )
  config.batch_size = 8
  return config


def _speech(folder, count):
  import datasets
  import soundfile

  from configs import speech
  from sigattn.data import speech as recordings

  prompts = speech.get_config()
  rows = recordings.open_source(prompts, prompts.data.train_split)
  batches = [rows.evaluate(np.array([i])) for i in range(64)]
  audio = np.concatenate([x["audio"][0, : x["samples"][0]] for x in batches])
  audio = recordings.resample(audio, prompts.data.sample_rate, 16_000)
  rng, samples, encoded = np.random.default_rng(0), 15 * 16_000, []
  for _ in range(count):
    content = io.BytesIO()
    start = rng.integers(len(audio) - samples)
    part = audio[start : start + samples]
    soundfile.write(content, part, 16_000, format="FLAC")
    encoded.append(
      {
        "audio": {"bytes": content.getvalue(), "path": "x"},
        "text": "the words of fifteen seconds " * 6,
      }
    )
  table = datasets.Dataset.from_list(encoded)
  table = table.cast_column("audio", datasets.Audio(decode=False))
  for split in ("train", "test"):
    table.to_parquet(folder / f"{split}.parquet")
  config = speech.get_config("librispeech")
  config = config.copy_and_resolve_references().unlock()
  config.data.update(source=str(folder), train_split="train", eval_split="test")
  config.batch_size = 16
  return config


CONFIGS = {"image": _image, "text": _text, "speech": _speech}


def _rate(config, seconds):
  """Examples or tokens of text per second, after the first batches."""
  from sigattn import tasks

  with contextlib.closing(tasks.train_batches(config)) as batches:
    for _ in range(2 + config.data.num_workers):
      next(batches)
    count, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
      batch = next(batches)
      if config.task == "lm":
        count += int((batch["token"][:, 1:] >= 0).sum())
      else:
        count += len(batch["target"])
  return count / spent


def _taken(path, models, name):
  """The highest of our rates in a file of train_step, or None."""
  if path is None:
    return None
  rows = json.loads(path.read_text())["rows"]
  rates = [
    row[name]
    for row in rows
    if row["model"] in models
    and row["implementation"] == "sigattn"
    and row.get(name)
  ]
  return max(rates, default=None)


def _arguments():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tasks", nargs="+", default=[*TASKS], choices=TASKS)
  parser.add_argument(
    "--workers", nargs="+", type=int, default=[0, os.cpu_count()]
  )
  parser.add_argument("--files", type=int, default=512, help="for each task")
  parser.add_argument("--seconds", type=float, default=15, help="for each row")
  parser.add_argument(
    "--step", type=pathlib.Path, help="a results file of train_step"
  )
  parser.add_argument(
    "--out", type=pathlib.Path, default=_FOLDER / "loading.json"
  )
  arguments = parser.parse_args()
  if arguments.step and not arguments.step.is_file():
    parser.error(f"--step {arguments.step}: there is no such file")
  return arguments


def main():
  arguments = _arguments()
  if "speech" in arguments.tasks:  # before the first minutes of work
    extras.require("speech")
  rows = []
  print(f"{'task':8}{'workers':>8}{'a second':>14}{'a GPU takes':>14}")
  for task in arguments.tasks:
    unit, models, name = TASKS[task]
    taken = _taken(arguments.step, models, name)
    with tempfile.TemporaryDirectory() as folder:
      config = CONFIGS[task](pathlib.Path(folder), arguments.files)
      for workers in [0] if task == "text" else arguments.workers:
        config.data.num_workers = workers
        rate = _rate(config, arguments.seconds)
        rows.append(
          {
            "task": task,
            "unit": unit,
            "workers": workers,
            "per_second": round(rate, 1),
            "gpu_takes": taken,
          }
        )
        shown = "-" if taken is None else f"{taken:,.0f}"
        print(f"{task:8}{workers:8}{rate:14,.0f}{shown:>14} {unit}", flush=True)
    _save(arguments.out, rows)
  print(f"written to {arguments.out}")


def _save(path, rows):
  result = {
    "cores": len(os.sched_getaffinity(0)),
    "date": datetime.date.today().isoformat(),
    "rows": rows,
  }
  path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  main()
