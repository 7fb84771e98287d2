"""Measures training steps: python -m benchmarks.train_step

It compares our training steps with those of other libraries on one GPU, in
bfloat16. Each side runs in its own process:

  1b, 85m  configs/lm.py, n = 4,096, with softmax by cuDNN, sigmoid and
           normalised sigmoid, with RoPE; sigmoid with ALiBi, as published; and
           LlamaForCausalLM of Hugging Face of the same size.
  vit_b16  configs/vit.py:imagenet without mixup and cutmix, batch 128 and 256,
           with softmax by XLA and sigmoid; and timm's vit_base_patch16_224.

The other libraries run under torch.compile, with parameters and AdamW's moments
in bfloat16 (ours are float32), the fused AdamW, and
scaled_dot_product_attention. A library that is not installed is skipped. Our
step is the one of train.py: loss, gradient, clipping, AdamW and the norms for
the metrics. The other libraries do not clip.

It prints a table and writes benchmarks/results/train_step_<device>.json after
each side. The rows of other models stay in the file. All sides of `1b` have
batch 4 on a card with less than 100 GiB, and otherwise 8. share_of_peak is the
share of 989 TFLOP/s. It counts 6 N operations per token, and for attention 6 L
n d, or 12 L n d if it is not causal.

  python -m benchmarks.train_step --models 1b --sides huggingface sigmoid
  python -m benchmarks.train_step --levers --models 1b  # what settings give
  python -m benchmarks.train_step --models 1b --sides sigmoid --profile
  python -m benchmarks.train_step --models 85m --set model.remat=none
  PYTHONPATH=timm-1.0.31-py3-none-any.whl python -m benchmarks.train_step
"""

import argparse
import ast
import datetime
import functools
import json
import pathlib
import statistics
import subprocess
import tempfile
import time

from benchmarks import processes

_FOLDER = pathlib.Path(__file__).parent / "results"
PEAK = 989e12  # FLOP/s of an H100 or H200 in bfloat16, without sparsity
# The time of a step is the median over ROUNDS of the mean over STEPS.
ROUNDS, STEPS, WARM_UP = 3, 4, 3
ROPE = {"model.positions": "rope", "attn.alibi": False}
SIGMOID = {"attn.kind": "sigmoid"}
SIDES = {  # {model: {side: changes of its config; None for other libraries}}
  "lm": {
    "huggingface": None,
    "softmax": ROPE | {"attn.kind": "softmax", "attn.implementation": "cudnn"},
    "sigmoid": ROPE | SIGMOID,
    "normalized": ROPE | SIGMOID | {"attn.normalize": True},
    "alibi": SIGMOID,
  },
  "vit": {
    "timm": None,
    # XLA computes it, because cuDNN refuses 197 tokens.
    "softmax": {"attn.kind": "softmax"},
    "sigmoid": SIGMOID,
  },
}
MODELS = {"1b": "lm", "85m": "lm", "vit_b16": "vit"}
BATCHES = {"85m": (8,), "vit_b16": (128, 256)}
# Changes of sigmoid's config. The first ones lead from an earlier config to the
# current one; those with dots change the current one. Names that begin with
# xla_ are options of the compiler; batch is a factor.
_LM = {"model.remat": "dots", "model.loss_chunks": 8, "model.max_unrolled": 24}
_VIT = {"model.remat": "none", "model.max_unrolled": 12}
_COMPILER = {
  "... latency hiding scheduler": {
    "xla_gpu_enable_latency_hiding_scheduler": True
  },
  "... products by cuBLAS alone": {"xla_gpu_enable_triton_gemm": False},
  "... products of one input merged": {"xla_gpu_dot_merger_threshold_mb": 4096},
  "... no command buffers": {"xla_gpu_enable_command_buffer": ""},
}
LEVERS = {
  "1b": {
    "recompute all, whole logits": {
      "model.remat": "all",
      "model.loss_chunks": 1,
    },
    "recompute all, loss in 8 chunks": {"model.remat": "all"},
    "keep products and attention": {},
    "... in a loop": {"model.max_unrolled": 6},
    "... gradients in bfloat16": {"optim.grad_dtype": "bfloat16"},
    "... gradients and first moment in bfloat16": {
      "optim.grad_dtype": "bfloat16",
      "optim.mu_dtype": "bfloat16",
    },
    **_COMPILER,
    "... loss in 4 chunks": {"model.loss_chunks": 4},
    "... keep all but out and down": {
      "model.remat": "query+key+value+attention+gate+up"
    },
    "... keep attention alone": {"model.remat": "attention"},
    "... recompute nothing, half the batch": {
      "model.remat": "none",
      "batch": 0.5,
    },
  },
  "vit_b16": {
    "keep all": {},
    "... in a loop": {"model.max_unrolled": 6},
    "keep products and attention": {"model.remat": "dots"},
    "... gradients in bfloat16": {"optim.grad_dtype": "bfloat16"},
    **_COMPILER,
  },
}
_DEFAULTS = {"1b": SIDES["lm"]["sigmoid"] | _LM, "vit_b16": SIGMOID | _VIT}


def _flops(params, layers, length, width, causal):
  """The operations of a training step for each token."""
  return 6 * params + (6 if causal else 12) * layers * length * width


def _timed(step, wait):
  """Median seconds of a step.

  wait: a function that waits for the result of `step`.
  """
  for _ in range(WARM_UP):
    last = step()
  wait(last)
  rounds = []
  for _ in range(ROUNDS):
    begin = time.perf_counter()
    for _ in range(STEPS):
      last = step()
    wait(last)
    rounds.append((time.perf_counter() - begin) / STEPS)
  return statistics.median(rounds)


# Our side, in a process of its own.


def _config(model, changes):
  from configs import lm, vit

  if MODELS[model] == "lm":
    config = lm.get_config(model)
  else:
    config = vit.get_config("imagenet,B/16")
  config = config.copy_and_resolve_references().unlock()
  if MODELS[model] == "vit":
    config.augment.update(mixup=0.0, cutmix=0.0)
  config.update_from_flattened_dict(changes)
  return config


def _batch(config):
  import numpy as np

  rng, count, data = np.random.default_rng(0), config.batch_size, config.data
  if config.task == "lm":
    shape = count, data.length + 1
    return {"token": rng.integers(0, data.vocab_size, shape, np.int32)}
  shape = count, data.image_size, data.image_size, data.channels
  return {
    "image": rng.integers(0, 256, shape, np.uint8),
    "target": rng.integers(0, data.num_classes, count, np.int32),
  }


def ours(model, batch, changes, profile=False):
  """The row of our step. changes: those of the config and of the compiler."""
  import jax

  from sigattn.training import mesh, step

  options = {k: v for k, v in changes.items() if k.startswith("xla_")}
  changes = {k: v for k, v in changes.items() if k not in options}
  config = _config(model, changes | {"batch_size": batch})
  devices = mesh.make()
  state, update = step.init(config, devices)
  examples = mesh.put(_batch(config), devices)
  begin = time.perf_counter()
  lowered = step.jitted(update).lower(state, examples)
  compiled = lowered.compile(compiler_options=options or None)
  row = {"compile_seconds": time.perf_counter() - begin}
  count = sum(x.size for x in jax.tree.leaves(state.params))
  holder = [state]
  del state  # It is donated to the first step.

  def run():
    holder[0], metrics = compiled(holder[0], examples)
    return metrics

  row["seconds"] = _timed(run, jax.block_until_ready)
  row["loss"] = float(run()["loss"])
  needs = compiled.memory_analysis()
  row["xla_gib"] = (
    needs.argument_size_in_bytes
    + needs.output_size_in_bytes
    + needs.temp_size_in_bytes
    - needs.alias_size_in_bytes
  ) / 2**30
  peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
  row["peak_gib"] = peak / 2**30 if peak else row["xla_gib"]
  row |= _rates(config, count, row["seconds"])
  row["device"] = jax.devices()[0].device_kind
  if profile:
    print_profile(run)
  return row


def _rates(config, params, seconds):
  model = config.model
  if config.task == "lm":
    length, rows = config.data.length, config.batch_size
    name = "tokens_per_second"
  else:
    side = config.data.image_size // model.patch_size
    length, rows = side**2 + 1, config.batch_size
    name = "images_per_second"
  flops = _flops(params, model.depth, length, model.width, config.task == "lm")
  examples = rows * (length if config.task == "lm" else 1)
  return {
    name: examples / seconds,
    "share_of_peak": rows * length * flops / seconds / PEAK,
  }


def print_profile(run, steps=2, units=1, unit="a step", most=60):
  """Prints the milliseconds of a step by kernel.

  units: the number of units in a step. unit: their name.
  """
  import jax

  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(steps):
        last = run()
      jax.block_until_ready(last)
    [path] = pathlib.Path(folder).rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(path))
  totals, counts = {}, {}
  parts = steps * units
  for plane in data.planes:
    if "GPU" not in plane.name:
      continue
    for line in plane.lines:
      if "Stream" not in line.name:
        continue
      for event in line.events:
        totals[event.name] = totals.get(event.name, 0) + event.duration_ns
        counts[event.name] = counts.get(event.name, 0) + 1
  print(
    f"{sum(totals.values()) / parts / 1e6:9.3f} ms {unit} in "
    f"{sum(counts.values()) / parts:.0f} kernels"
  )
  for name in sorted(totals, key=totals.get, reverse=True)[:most]:
    print(
      f"{totals[name] / parts / 1e6:9.4f} ms {counts[name] / parts:7.1f} "
      f"times  {name[:110]}"
    )


# The parent process: it starts a process for each side and collects the rows.


def _side(model, side, batch, changes, profile):
  """Measures one side. The last line that it prints is its row, as JSON."""
  from benchmarks import train_peers

  if side == "huggingface":
    row = train_peers.huggingface(_config(model, {}), batch, _timed)
  elif side == "timm":
    row = train_peers.timm(_config(model, {}), batch, _timed)
  else:
    row = ours(model, batch, changes, profile)
  if side in train_peers.PACKAGES:
    row |= _rates(
      _config(model, {"batch_size": batch}), row.pop("params"), row["seconds"]
    )
  print(json.dumps(row))


def _measure(model, side, batch, changes, timeout, profile=False):
  """The row of a side, or {"error": reason} if it could not be measured."""
  begin = time.perf_counter()
  lines, reason = processes.printed(
    [
      "benchmarks.train_step", "--one", model, side, str(batch),
      json.dumps(changes), *(["--profile"] if profile else []),
    ],
    timeout,
  )  # fmt: skip
  if reason or not lines:
    return {"error": reason or "it printed nothing"}
  print(*lines[:-1], sep="\n", end="\n" if lines[1:] else "")
  row = json.loads(lines[-1])
  return row | {"process_seconds": time.perf_counter() - begin}


def _row(model, side, batch, changes, found):
  """A row of the results file."""
  peers = {"huggingface": "Hugging Face", "timm": "timm"}
  kind = changes.get("attn.kind", "softmax")
  if changes.get("attn.normalize"):
    kind = "normalized sigmoid"
  settings = {k: v for k, v in changes.items() if not k.startswith("attn.")}
  digits = {"seconds": 4, "share_of_peak": 3}
  return {
    "model": model,
    "implementation": peers.get(side, "sigattn"),
    "kind": kind,
    "side": side,
    "batch": batch,
    "settings": settings,
    **{
      name: round(x, digits.get(name, 2 if name == "loss" else 1))
      if isinstance(x, float)
      else x
      for name, x in found.items()
    },
  }


def _compare(rows):
  """Adds `peer` and the ratios to it and to softmax to each of our rows."""
  for row in rows:
    rate = row.get("tokens_per_second") or row.get("images_per_second")
    row["peer"] = row["ratio_to_peer"] = row["ratio_to_softmax"] = None
    if row["implementation"] != "sigattn" or not rate:
      continue
    for other in rows:
      same = (other["model"], other["batch"]) == (row["model"], row["batch"])
      speed = other.get("tokens_per_second") or other.get("images_per_second")
      if not same or not speed:
        continue
      if other["implementation"] != "sigattn":
        row["peer"], row["ratio_to_peer"] = speed, round(rate / speed, 3)
      elif other["side"] == "softmax":
        row["ratio_to_softmax"] = round(rate / speed, 3)
  return rows


def _table(rows):
  """Prints the rows, aligned."""
  print(
    f"{'model':8} {'side or setting':46} {'batch':>5} {'a second':>10} "
    f"{'ms':>7} {'peak':>6} {'GiB':>6} {'compile':>8} {'of peer':>8} "
    f"{'of softmax':>10}"
  )
  for row in rows:
    name = row.get("lever") or f"{row['implementation']}, {row['side']}"
    start = f"{row['model']:8} {name[:46]:46} {row['batch']:5}"
    if "error" in row:
      print(start, row["error"])
      continue
    rate = row.get("tokens_per_second") or row["images_per_second"]
    ratios = [
      "-" if row.get(x) is None else f"{row[x]:.3f}"
      for x in ("ratio_to_peer", "ratio_to_softmax")
    ]
    print(
      f"{start} {rate:10,.0f} {row['seconds'] * 1e3:7.1f} "
      f"{row['share_of_peak']:6.1%} {row['peak_gib']:6.1f} "
      f"{row['compile_seconds']:7.1f}s {ratios[0]:>8} {ratios[1]:>10}"
    )


def card():
  """(name, GiB) of the first GPU.

  It asks nvidia-smi, because JAX would occupy the GPU.
  """
  done = subprocess.run(
    [
      "nvidia-smi", "--query-gpu=name,memory.total",
      "--format=csv,noheader,nounits",
    ],
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  name, mib = done.stdout.splitlines()[0].rsplit(",", 1)
  return name.strip(), float(mib) / 1024


def _parts(arguments, batch_1b):
  """Yields (model, side, batch, changes, lever) for each measurement."""
  extra = dict(arguments.set)
  for model in arguments.models:
    sides = SIDES[MODELS[model]]
    if arguments.levers:
      whole = BATCHES.get(model, (batch_1b,))[-1]
      for lever, changes in LEVERS[model].items():
        changes = _DEFAULTS[model] | changes | extra
        batch = int(whole * changes.pop("batch", 1))
        yield model, "sigmoid", batch, changes, lever
      continue
    for batch in BATCHES.get(model, (batch_1b,)):
      for side, changes in sides.items():
        if arguments.sides and side not in arguments.sides:
          continue
        changes = {} if changes is None else changes | extra
        yield model, side, batch, changes, None


def setting(text):
  """Parses "model.remat=dots", for --set, as ("model.remat", "dots")."""
  path, _, value = text.partition("=")
  try:
    return path, ast.literal_eval(value)
  except (SyntaxError, ValueError):
    return path, value


def _arguments():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--models", nargs="+", default=[*MODELS], choices=MODELS)
  parser.add_argument(
    "--sides", nargs="+", choices=[*SIDES["lm"], "timm"], help="all by default"
  )
  parser.add_argument("--levers", action="store_true")
  parser.add_argument("--profile", action="store_true")
  parser.add_argument(
    "--set", nargs="+", default=[], type=setting, metavar="PATH=VALUE",
    help="changes the config of our sides, or the compiler: xla_OPTION=VALUE",
  )  # fmt: skip
  parser.add_argument(
    "--batch-1b", type=int, help="by default 8, or 4 on a small card"
  )
  parser.add_argument(
    "--timeout", type=float, default=150, help="most seconds of one side"
  )
  parser.add_argument(
    "--budget", type=float, default=530, help="seconds until no side starts"
  )
  parser.add_argument(
    "--out", type=pathlib.Path, help="the file to write, instead of the default"
  )
  parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.out and arguments.out.is_dir():
    parser.error(f"--out {arguments.out}: is a folder; must be a file")
  return arguments


def main():
  arguments = _arguments()
  if arguments.one:
    model, side, batch, changes = arguments.one
    _side(model, side, int(batch), json.loads(changes), arguments.profile)
    return
  if arguments.levers:
    arguments.models = [x for x in arguments.models if x in LEVERS]
  device, memory = card()
  batch_1b = arguments.batch_1b or (8 if memory > 100 else 4)
  name = "train_step_levers" if arguments.levers else "train_step"
  device_name = device.replace(" ", "_").lower()
  path = arguments.out or _FOLDER / f"{name}_{device_name}.json"
  save = functools.partial(_save, path, device)
  begin, rows = time.perf_counter(), []
  others = _rows_of_others(path, device, arguments.models)
  for model, side, batch, changes, lever in _parts(arguments, batch_1b):
    if time.perf_counter() - begin > arguments.budget:
      found = {"error": "not started: the budget of seconds was used up"}
    else:
      found = _measure(
        model, side, batch, changes, arguments.timeout, arguments.profile
      )
    row = _row(model, side, batch, changes, found)
    if lever:
      row["lever"] = lever
    rows.append(row)
    print(
      f"{time.perf_counter() - begin:5.0f} s: {model} {lever or side}",
      found.get("error", ""), flush=True,
    )  # fmt: skip
    save(others + _compare(rows))
  print(f"{device}, {memory:.0f} GiB")
  _table(rows)
  print(f"written to {path}")


def _rows_of_others(path, device, models):
  """The rows in the file of models that are not measured now."""
  if not path.is_file():
    return []
  result = json.loads(path.read_text())
  rows = result["rows"] if result["device"] == device else []
  return [row for row in rows if row["model"] not in models]


def _save(path, device, rows):
  import jax

  from benchmarks import attention

  result = {
    "device": device,
    "date": datetime.date.today().isoformat(),
    "commit": attention.commit(),
    "jax": jax.__version__,
    "method": f"median of {ROUNDS} rounds of {STEPS} steps",
    "rows": rows,
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  main()
