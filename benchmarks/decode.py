"""Measures generation, token by token: python -m benchmarks.decode

On one GPU, in bfloat16, for the sizes 85m and 1b of configs/lm_sigmoid.py with
random weights, after prompts of several lengths. Our cache contains random keys
and values. It is not filled by reading prompts, because that would take longer
than all measurements.

milliseconds_per_token is the time of a step, which adds one token to each row.
It is the median of a few rounds of `--tokens` steps. bytes_bound_ms is the time
to read the bytes that a step needs: the parameters in bfloat16, and the keys
and values that are visible half-way through a round. The bandwidth is that of
copying an array in the same run, where bytes read and bytes written both count.
ratio is milliseconds_per_token / bytes_bound_ms.

  python -m benchmarks.decode
  python -m benchmarks.decode --models 1b --cases 1x512 --trace
  python -m benchmarks.decode --models 1b --cases 1x512 --peers dynamic static
  python -m benchmarks.decode --set attn.normalize=True xla_gpu_autotune_level=4
  python -m benchmarks.decode --set cache=paged
  python -m benchmarks.decode --set cache_dtype=float8_e4m3fn

--peers also measures `generate` of Hugging Face's LlamaForCausalLM of the same
size, with its dynamic cache or its static cache. For the static cache, it is
compiled by torch.compile, and the time to compile is not counted. The peers
read real prompts of random tokens. --trace prints the time of each kernel.

It prints a table and writes benchmarks/results/decode_<device>.json. The rows
of other models and cases stay in the file.
"""

import argparse
import datetime
import functools
import json
import math
import pathlib
import statistics
import time

import numpy as np

from benchmarks import processes, train_step

_FOLDER = pathlib.Path(__file__).parent / "results"
MODELS = ("85m", "1b")
CASES = ("1x512", "32x512", "8x4000", "1x32000", "64x2000")
PEERS = {
  "dynamic": "Hugging Face, dynamic cache",
  "static": "Hugging Face, static cache, compiled",
}
ROUNDS = 3


def _sizes(case):
  """(rows, tokens of the prompt) of a case, such as 32x512."""
  return tuple(map(int, case.split("x")))


def _config(model, changes):
  from configs import lm_sigmoid

  config = lm_sigmoid.get_config(model)
  config = config.copy_and_resolve_references().unlock()
  config.update_from_flattened_dict(changes)
  return config


# Our side, in a process of its own.


def bytes_of_step(params, cache, tokens):
  """The bytes that a step reads: all parameters, and `tokens` of the cache.

  The embedding is read once, for the logits.
  """
  import jax

  def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

  slots = math.prod(jax.tree.leaves(cache)[0].shape[:2])
  return size(params) + size(cache) * tokens / slots


def _random(shapes):
  """Random arrays of these shapes. Vectors, which are scales, are 1."""
  import jax
  import jax.numpy as jnp

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def normal(key, shape, dtype):
    return 0.02 * jax.random.normal(key, shape, dtype)

  leaves, tree = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  arrays = [
    normal(key, x.shape, x.dtype) if x.ndim > 1 else jnp.ones(x.shape, x.dtype)
    for key, x in zip(keys, leaves, strict=True)
  ]
  return jax.tree.unflatten(tree, arrays)


def ours(model, cases, changes, tokens, trace):
  """Yields the row of each case."""
  from benchmarks import timing
  from sigattn.data import text
  from sigattn.inference import engine, generate

  changes = dict(changes)
  cache = {k: changes.pop(k) for k in ("cache", "cache_dtype") if k in changes}
  generate.Options(**cache).validate()
  options = {k: v for k, v in changes.items() if k.startswith("xla_")}
  config = _config(
    model, {k: v for k, v in changes.items() if k not in options}
  )
  bandwidth = timing.copy_rate()
  graphdef, shapes = engine.shapes(config)
  params = _random(shapes)
  vocabulary = text.vocab_size(config)
  machine = engine.Engine(graphdef, params, vocabulary, end=-1)
  for case in cases:
    yield _our_row(machine, case, bandwidth, tokens, options, trace, **cache)


def _empty(machine, case, tokens, cache="contiguous", cache_dtype=None):
  from sigattn.inference import pages

  rows, prompt = _sizes(case)
  if cache == "contiguous":
    return machine.empty(rows, prompt + tokens, cache_dtype)
  held = pages.Pages.for_prompts([prompt + tokens] * rows, 0, rows)
  for row in range(rows):
    held.take(row, np.zeros(0, np.int32), prompt + tokens)
  return machine.empty_pages(held, cache_dtype)


def _our_row(machine, case, bandwidth, tokens, options, trace, **cache):
  import jax
  import jax.numpy as jnp

  from sigattn.inference.sampling import Sampling

  rows, prompt = _sizes(case)
  state = _empty(machine, case, tokens, **cache)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.cache
  )
  state = state._replace(cache=None)
  state = state._replace(cache=_random(shapes))
  greedy = Sampling(temperature=0)
  begin = time.perf_counter()
  lowered = machine.lower_decode(state, tokens, greedy)
  compiled = lowered.compile(compiler_options=options or None)
  row = {"compile_seconds": time.perf_counter() - begin}
  holder = [state]
  del state  # It is donated to the first call.

  def run():
    length_B = jnp.full((rows,), prompt, jnp.int32)
    begin = holder[0]._replace(length_B=length_B, left_B=length_B + tokens)
    token_BT, holder[0] = compiled(machine.params, begin)
    return token_BT

  def seconds():
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin

  seconds()
  took = statistics.median(seconds() for _ in range(ROUNDS))
  seen = rows * (prompt + tokens / 2)
  needed = bytes_of_step(machine.params, holder[0].cache, seen)
  if trace:
    train_step.print_profile(
      run, steps=1, units=tokens, unit="a token", most=15
    )
  return row | {
    "rows": rows,
    "prompt": prompt,
    "milliseconds_per_token": took / tokens * 1e3,
    "bytes_bound_ms": needed / bandwidth * 1e3,
    "gigabytes": needed / 1e9,
    "copy_gigabytes_per_second": bandwidth / 1e9,
  }


# The peers, each in a process of its own.


def huggingface(model, cases, tokens, static, device="cuda"):
  """Yields {"milliseconds"} of each case, or its "error"."""
  import torch
  import transformers

  config = _config(model, {})
  shape = transformers.LlamaConfig(
    vocab_size=config.data.vocab_size,
    hidden_size=config.model.width,
    intermediate_size=config.model.mlp_dim,
    num_hidden_layers=config.model.depth,
    num_attention_heads=config.model.num_heads,
    max_position_embeddings=2**16,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
  )
  shape._attn_implementation = "sdpa"
  torch.set_float32_matmul_precision("high")
  with torch.device(device):
    network = transformers.LlamaForCausalLM(shape).to(torch.bfloat16).eval()
  for case in cases:
    rows, prompt = _sizes(case)
    token_BT = torch.randint(shape.vocab_size, (rows, prompt), device=device)
    try:
      # A static cache is compiled by the first call.
      for _ in range(2 if static else 1):
        found = _generate(network, token_BT, tokens, static)
    except torch.OutOfMemoryError as error:
      found = {"error": str(error)[:200]}
    yield {"rows": rows, "prompt": prompt} | found
    torch.compiler.reset()
    torch.cuda.empty_cache()


def _generate(network, token_BT, tokens, static):
  """{"milliseconds"} of a step, from the fifth on."""
  import torch
  import transformers

  first, times = 4, []

  class Clock(transformers.StoppingCriteria):
    """Notes the time after the first and the last step. It stops nothing."""

    steps = 0

    def __call__(self, token_BT, scores, **_):
      self.steps += 1
      if self.steps in (first, first + tokens):
        if token_BT.is_cuda:
          torch.cuda.synchronize()
        times.append(time.perf_counter())
      return torch.zeros(len(token_BT), dtype=bool, device=token_BT.device)

  with torch.inference_mode():
    network.generate(
      token_BT,
      attention_mask=torch.ones_like(token_BT),
      max_new_tokens=first + tokens,
      do_sample=False,
      stopping_criteria=[Clock()],
      **({"cache_implementation": "static"} if static else {}),
    )
  return {"milliseconds": (times[1] - times[0]) / tokens * 1e3}


# The parent: starts a process for each side of a model, collects the rows.


def _side(side, arguments):
  """Measures one side and prints each row as a line of JSON."""
  [model] = arguments.models
  if side == "ours":
    found = ours(
      model, arguments.cases, dict(arguments.set), arguments.tokens,
      arguments.trace,
    )  # fmt: skip
  else:
    found = huggingface(
      model, arguments.cases, arguments.tokens, side == "static"
    )
  for row in found:
    print(json.dumps(row), flush=True)


def _measure(side, model, arguments):
  """The rows that one side's process printed before it ended."""
  pairs = [f"{path}={value!r}" for path, value in arguments.set]
  begin = time.perf_counter()
  lines, reason = processes.printed(
    [
      "benchmarks.decode", "--side", side, "--models", model,
      "--cases", *arguments.cases, "--tokens", str(arguments.tokens),
      *(["--trace"] if arguments.trace else []),
      *(["--set", *pairs] if pairs else []),
    ],
    arguments.timeout,
  )  # fmt: skip
  rows, others = [], []
  for line in lines:
    (rows if line.startswith("{") else others).append(line)
  if others:
    print(*others, sep="\n")
  print(
    f"{time.perf_counter() - begin:5.0f} s: {model} {side}", reason or "",
    flush=True,
  )  # fmt: skip
  return [json.loads(row) for row in rows]


def _joined(model, changes, found):
  """The rows of the file: our row of each case, with the peers' times.

  found: {side: rows}. `peer` is the time of the fastest peer.
  """
  rows = []
  for own in found["ours"]:
    times = {
      PEERS[side]: row.get("milliseconds", row.get("error"))
      for side, measured in found.items()
      if side in PEERS
      for row in measured
      if (row["rows"], row["prompt"]) == (own["rows"], own["prompt"])
    }
    numbers = {k: v for k, v in times.items() if isinstance(v, float)}
    name = min(numbers, key=numbers.get, default=None)
    ratio = own["milliseconds_per_token"] / own["bytes_bound_ms"]
    rows.append(
      {"model": model, "settings": changes}
      | own
      | {
        "ratio": ratio,
        "peer": numbers.get(name),
        "peer_name": name,
        "times_faster": numbers[name] / own["milliseconds_per_token"]
        if name
        else None,
        "peers": times,
      }
    )
  return [_rounded(row) for row in rows]


def _rounded(row):
  return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def _table(rows):
  """Prints the rows, aligned."""
  print(
    f"{'model':6} {'rows':>5} {'prompt':>7} {'ms a token':>11} "
    f"{'bound':>8} {'ratio':>6} {'peer':>9} {'faster':>7} {'compile':>8}"
  )
  for row in rows:
    peer, faster = row["peer"], row["times_faster"]
    print(
      f"{row['model']:6} {row['rows']:5} {row['prompt']:7} "
      f"{row['milliseconds_per_token']:11.3f} {row['bytes_bound_ms']:8.3f} "
      f"{row['ratio']:6.2f} {'-' if peer is None else f'{peer:.2f}':>9} "
      f"{'-' if faster is None else f'{faster:.1f}':>7} "
      f"{row['compile_seconds']:7.1f}s"
    )


def _save(path, device, rows):
  """Writes the rows, and keeps those of the file that were not measured."""
  import jax

  from benchmarks import attention

  def key(row):
    return row["model"], row["rows"], row["prompt"], str(row["settings"])

  kept = []
  if path.is_file():
    before = json.loads(path.read_text())
    measured = {key(row) for row in rows}
    if before["device"] == device:
      kept = [row for row in before["rows"] if key(row) not in measured]
  result = {
    "device": device,
    "date": datetime.date.today().isoformat(),
    "commit": attention.commit(),
    "jax": jax.__version__,
    "method": f"median of {ROUNDS} rounds",
    "rows": kept + rows,
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(result, indent=1) + "\n")


def _arguments():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
  parser.add_argument(
    "--cases", nargs="+", default=CASES, help="rows x tokens of the prompt"
  )
  parser.add_argument("--peers", nargs="*", default=(), choices=PEERS)
  parser.add_argument("--tokens", type=int, default=64, help="in a round")
  parser.add_argument("--trace", action="store_true")
  parser.add_argument(
    "--set", nargs="+", default=[], type=train_step.setting,
    metavar="PATH=VALUE", help="of our config, or xla_OPTION=VALUE",
  )  # fmt: skip
  parser.add_argument(
    "--timeout", type=float, default=280, help="seconds of one side of a model"
  )
  parser.add_argument("--out", type=pathlib.Path, help="instead of results/")
  parser.add_argument("--side", help=argparse.SUPPRESS)
  return parser.parse_args()


def main():
  arguments = _arguments()
  if arguments.side:
    _side(arguments.side, arguments)
    return
  device, _ = train_step.card()
  name = f"decode_{device.replace(' ', '_').lower()}.json"
  path, rows = arguments.out or _FOLDER / name, []
  for model in arguments.models:
    sides = ("ours", *arguments.peers)
    found = {side: _measure(side, model, arguments) for side in sides}
    rows += _joined(model, dict(arguments.set), found)
    _save(path, device, rows)
  print(device)
  _table(rows)
  print(f"written to {path}")


if __name__ == "__main__":
  main()
