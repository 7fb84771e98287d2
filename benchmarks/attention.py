"""Measures attention: python -m benchmarks.attention

On a GPU it measures our kernels and every installed baseline in bfloat16. It
measures the memory of a forward and backward pass, and then the time of the
forward pass, the backward pass and both, for 16,384 tokens with N H = 2,048,
for ViT-B's 196 tokens, and for batches that contain padding. It prints one
table and writes benchmarks/results/kernels_<device>.json.

On a CPU it measures, for each length, the peak memory of one forward and
backward pass of sigmoid attention (B=1, N=4, H=64, float32) beyond what the
process used before. The table also has the size of one n x n matrix of weights,
of which plain JAX keeps several. It writes benchmarks/results/memory_cpu.json.

  python -m benchmarks.attention --lengths 1024 8192 --baselines mosaic cuDNN
  python -m benchmarks.attention \\
    --plot benchmarks/results/kernels_h100_64.json  # draws the .png beside it
  python -m benchmarks.attention --table attention_h200  # the README's rows
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import decimal
import functools
import json
import math
import multiprocessing
import os
import pathlib
import platform
import re
import statistics
import subprocess

import jax
import jax.numpy as jnp

from benchmarks import baselines
from benchmarks.baselines import Cell
from benchmarks.timing import milliseconds
from sigattn.kernels import dispatch

HEADS, WIDTH = 4, 64  # of the table for a CPU
LENGTHS = tuple(1024 * 2**i for i in range(6))  # a GPU's table omits the last
TOKENS, CHANNELS = 16384, 2048  # B n and N H of a GPU's table
_ROUNDS, _SETTLE = 5, 0.1  # seconds
_FOLDER = pathlib.Path(__file__).parent / "results"


def memory(length):
  """{seq_len, peak_mib, weights_mib} of a length, measured in a new process."""
  # multiprocessing.Pool would restart a worker that cannot start, forever.
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
    peak = pool.submit(_measure, length).result()
  return {
    "seq_len": length,
    "peak_mib": round(peak, 1),
    "weights_mib": HEADS * length**2 * 4 / 2**20,
  }


def _measure(length):
  @jax.jit
  def gradients(x):
    def loss(q, k, v):
      out = dispatch.attention(
        q, k, v, dispatch.Operands(), kind="sigmoid", scale=WIDTH**-0.5,
        logit_bias=-math.log(length),
      )  # fmt: skip
      return (out**2).sum()

    return jax.grad(loss, (0, 1, 2))(x, x, x)

  # After a first call, the memory that JAX itself needs is not counted.
  jax.block_until_ready(gradients(jnp.ones((1, 8, HEADS, WIDTH))))
  before = _peak_mib()
  x = jax.random.normal(jax.random.key(0), (1, length, HEADS, WIDTH))
  jax.block_until_ready(gradients(x))
  return _peak_mib() - before


def _peak_mib():
  # getrusage does not work here: a process inherits the peak of its parent.
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10


def commit():
  """Git's description of the measured commit; None outside of a checkout."""
  done = subprocess.run(
    ["git", "describe", "--always", "--dirty"],
    cwd=_FOLDER.parent, capture_output=True, text=True, check=False,
  )  # fmt: skip
  return done.stdout.strip() or None


def cells(lengths, widths):
  """The problem sizes of a GPU's table."""
  table = [
    Cell(width, length, max(TOKENS // length, 1), CHANNELS // width, causal)
    for width in widths
    for length in lengths
    for causal in (False, True)
  ]
  if 64 in widths:
    table.append(Cell(64, 196, 256, 12, False))
  if 128 in widths:  # Last, because TritonSigmoid tunes for minutes here.
    table += [Cell(128, 2048, 8, 16, False, part) for part in (0.25, 0.5)]
  return table


def _matmul_tflops():
  """The TFLOP/s of a product of 8192 x 8192 bfloat16 matrices."""
  x = jax.random.normal(jax.random.key(0), (8192, 8192), "bfloat16")
  product = jax.jit(jnp.matmul)
  return 2 * 8192**3 / milliseconds(lambda: product(x, x)) / 1e9


def _able(field, cell):
  return (baseline for baseline in field if baseline.can(cell))


@contextlib.contextmanager
def _reported(baseline, cell):
  """Prints an error instead of raising it: a baseline may refuse a size."""
  try:
    yield
  except Exception as error:
    reason = str(error).strip().splitlines() or [""]
    print(f"{baseline.name}, {cell}: {type(error).__name__} {reason[0][:100]}")


def _memory_on_gpu(widths, field):
  for width in widths:
    cell = Cell(width, 4096, 4, CHANNELS // width, False)
    for baseline in _able(field, cell):
      with _reported(baseline, cell):
        yield {
          "implementation": baseline.name,
          "head_dim": width,
          "seq_len": cell.length,
        } | baselines.memory(baseline, cell)


def prepare(table, field):
  """{(cell, baseline): calls}, compiled in parallel if that is possible.

  Compilation takes most of the time that a table needs. It must not run while
  a call is timed.
  """
  pairs = [
    (cell, baseline)
    for cell in table
    for baseline in _able(field, cell)
    if baseline.compiled
  ]

  def run(pair):
    cell, baseline = pair
    with _reported(baseline, cell):
      calls = baseline.calls(cell)
      for direction in baselines.PASSES:
        baseline.wait(calls[direction]())
      return calls

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    prepared = dict(zip(pairs, pool.map(run, pairs), strict=True))
  return {pair: calls for pair, calls in prepared.items() if calls}


def speed(cell, field, prepared):
  """Yields a row for each baseline of `field` and each pass.

  They are timed in turn, so that a card that throttles slows all of them alike.
  Every second round has the opposite order.
  """
  calls = {}
  for baseline in _able(field, cell):
    if baseline.compiled and (cell, baseline) not in prepared:
      continue  # Its error was printed when it was prepared.
    with _reported(baseline, cell):
      by_pass = prepared.get((cell, baseline)) or baseline.calls(cell)
      for direction in baselines.PASSES:
        baseline.wait(by_pass[direction]())
      calls |= {(baseline, name): call for name, call in by_pass.items()}
  rounds = {key: [] for key in calls}
  for turn in range(_ROUNDS):
    for (baseline, direction), call in list(calls.items())[:: (-1) ** turn]:
      with _reported(baseline, cell):
        time = milliseconds(call, baseline.wait, repeats=1, settle=_SETTLE)
        rounds[baseline, direction].append(time)
  times = {key: statistics.median(x) for key, x in rounds.items() if x}
  for (baseline, direction), time in times.items():
    softmax = [t for (r, d), t in times.items() if r.softmax and d == direction]
    yield {
      "implementation": baseline.name,
      "pass": direction,
      "head_dim": cell.width,
      "seq_len": cell.length,
      "batch": cell.batch,
      "heads": cell.heads,
      "causal": cell.causal,
      "padding": cell.padding,
      "normalize": baseline.normalize,
      "dtype": "bfloat16",
      "milliseconds": round(time, 4),
      "tflops": round(cell.flops(direction) / time / 1e9, 1),
      "ratio_to_best_softmax": round(min(softmax) / time, 3)
      if softmax
      else None,
    }


def _gpu(lengths, widths, field, save):
  """The whole result. A partial result is saved after each cell."""
  kind = jax.devices()[0].device_kind
  ceiling = _matmul_tflops()
  print(f"{kind}: a product of matrices at {ceiling:.0f} TFLOP/s")
  columns = (
    "implementation", "pass", "head_dim", "seq_len", "causal", "padding",
    "milliseconds", "tflops", "ratio_to_best_softmax",
  )  # fmt: skip
  result = {
    "matmul_tflops": round(ceiling, 1),
    "method": f"all in turn, {_ROUNDS} times, in every second round from the"
    " last to the first; medians of host timings of up to 200 calls in a row,"
    f" after the same call has run for {_SETTLE} seconds",
  }
  result["memory"] = list(_memory_on_gpu(widths, field))
  print("memory of a forward and backward pass, full, 16,384 tokens:")
  for row in result["memory"]:
    print("{:26} H{} n{}: saved {} MiB, peak {} MiB".format(*row.values()))
  result["rows"] = []
  print("{:35}{:>10}{:>9}{:>8}{:>7}{:>8}{:>13}{:>8} {}".format(*columns))
  table = cells(lengths, widths)
  prepared = prepare(table, field)
  for cell in table:
    for row in speed(cell, field, prepared):
      row["share_of_matmul_ceiling"] = round(row["tflops"] / ceiling, 3)
      result["rows"].append(row)
      print(
        "{:35}{:>10}{:9}{:8}{:>7}{:8}{:13.3f}{:8.1f} {}".format(
          *(row[x] if x != "causal" else str(row[x]) for x in columns)
        ),
        flush=True,
      )
    save(result)
  result["ratios"] = list(_means(result["rows"]))
  print("speed-up over the fastest softmax baseline, without padded cells:")
  for row in result["ratios"]:
    print("{:26}{:>10} H{}: mean {:.3f}, least {:.3f}".format(*row.values()))
  return result


def _means(rows):
  """Geometric mean and minimum of ratio_to_best_softmax."""
  groups = {}
  for row in rows:
    ratio = row["ratio_to_best_softmax"]
    if ratio is not None and row["implementation"].startswith("sigattn"):
      key = row["implementation"], row["pass"], row["head_dim"]
      groups.setdefault(key, []).append(ratio)
  for (name, direction, width), ratios in groups.items():
    yield {
      "implementation": name,
      "pass": direction,
      "head_dim": width,
      "mean": round(statistics.geometric_mean(ratios), 3),
      "least": min(ratios),
    }


_PUBLISHED = 1024, 4096, 16384  # tokens of the README's rows


def speedups(names):
  """Yields the rows of the README's table of speed, as Markdown.

  names: of files of a GPU, as result_path takes them. A cell is the speed-up
  over the fastest softmax of the same file, without a mask / with a causal
  mask.
  """
  for name in names:
    result = json.loads(result_path(name).read_text())
    rows, card = result["rows"], result["device"].split()[1]
    for place in sorted({(r["head_dim"], r["seq_len"]) for r in rows}):
      if place[1] in _PUBLISHED:
        cells = [
          _speedup(rows, f"sigattn mosaic{form}", direction, *place)
          for form in ("", " normalized")
          for direction in ("forward", "backward")
        ]
        cells = [card, str(place[0]), f"{place[1]:,}", *cells]
        yield "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def _speedup(rows, implementation, direction, width, length):
  found = [
    decimal.Decimal(str(row["ratio_to_best_softmax"]))
    for causal in (False, True)
    for row in rows
    if row["implementation"] == implementation
    and (row["pass"], row["causal"]) == (direction, causal)
    and (row["head_dim"], row["seq_len"]) == (width, length)
    and not row["padding"]
  ]
  hundredth, half_up = decimal.Decimal("0.01"), decimal.ROUND_HALF_UP
  return " / ".join(str(x.quantize(hundredth, half_up)) for x in found)


def plot(path):
  """Draws TFLOP/s against the length, from 512 tokens on.

  path: x.json, a result of a GPU. Returns x.png.
  """
  from matplotlib import pyplot

  result = json.loads(path.read_text())
  rows = [r for r in result["rows"] if not r["padding"] and r["seq_len"] >= 512]
  names = list(dict.fromkeys(r["implementation"] for r in rows))
  panels = [
    (width, direction)
    for width in sorted({r["head_dim"] for r in rows})
    for direction in ("forward", "backward")
  ]
  figure, axes = pyplot.subplots(
    len(panels) // 2, 2, figsize=(11, 2 * len(panels)), squeeze=False,
    layout="constrained",
  )  # fmt: skip
  for ax, (width, direction) in zip(axes.flat, panels, strict=True):
    for index, name in enumerate(names):
      for causal, style in ((False, "-o"), (True, "--o")):
        points = [
          (r["seq_len"], r["tflops"])
          for r in rows
          if (r["implementation"], r["head_dim"], r["pass"], r["causal"])
          == (name, width, direction, causal)
        ]
        if points:
          ours = name.startswith("sigattn")
          ax.plot(
            *zip(*points, strict=True), style, color=f"C{index}", markersize=3,
            linewidth=2.2 if ours else 1.1, label=None if causal else name,
          )  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set(
      title=f"{direction}, head width {width}", xlabel="tokens of a sequence",
      ylabel="TFLOP/s", ylim=0,
    )  # fmt: skip
    ax.grid(alpha=0.3)
  figure.legend(
    *axes[0, 0].get_legend_handles_labels(), loc="outside right upper",
    frameon=False,
  )  # fmt: skip
  figure.suptitle(
    f"{result['device']}, bfloat16, 16,384 tokens; dashed: causal", fontsize=11
  )
  figure.savefig(path.with_suffix(".png"), dpi=110)
  return path.with_suffix(".png")


def _cpu(lengths):
  print(f"{'length':>8} {'peak MiB':>10} {'one matrix MiB':>15}")
  rows = []
  for length in lengths:
    rows.append(row := memory(length))
    print(
      f"{length:8,} {row['peak_mib']:10,.1f} {row['weights_mib']:15,.1f}",
      flush=True,
    )
  return {
    "pass": "forward and backward, sigmoid, B=1, N=4, H=64, float32",
    "rows": rows,
  }


def result_path(name):
  """The file of a result. name: as in write."""
  is_path = name.endswith(".json")
  return pathlib.Path(name) if is_path else _FOLDER / f"{name}.json"


def write(name, device, measurements):
  """Writes a file of results and returns its path.

  name: a path that ends with .json, or the name of a file in
  benchmarks/results/ without this suffix. device: the name of the device.
  measurements: a dict, written after the device, the date, the commit and the
  version of jax.
  """
  result = {
    "device": device,
    "date": datetime.date.today().isoformat(),
    "commit": commit(),
    "jax": jax.__version__,
  }
  path = result_path(name)
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(result | measurements, indent=1) + "\n")
  return path


def main():
  # Leave memory for torch. JAX reads this when it first looks for a GPU.
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--lengths", type=int, nargs="+")
  parser.add_argument("--widths", type=int, nargs="+", default=(64, 128))
  parser.add_argument(
    "--out",
    help="a .json file, or a name in benchmarks/results/; default: the device",
  )
  parser.add_argument(
    "--baselines", nargs="+", default=[""], metavar="NAME",
    help="parts of names of baselines; default: all that are installed",
  )  # fmt: skip
  parser.add_argument(
    "--plot", type=pathlib.Path, help="only draw the picture of this file"
  )
  parser.add_argument(
    "--table", nargs="+", metavar="NAME",
    help="only print the README's rows of these files, named as for --out",
  )  # fmt: skip
  arguments = parser.parse_args()
  if arguments.table:
    for name in arguments.table:
      if not result_path(name).is_file():
        parser.error(f"--table {name}: there is no file {result_path(name)}")
    print(*speedups(arguments.table), sep="\n")
    return
  chosen = set()
  for part in arguments.baselines:
    names = {
      x.name for x in baselines.BASELINES if part.lower() in x.name.lower()
    }
    if not names:
      known = ", ".join(baseline.name for baseline in baselines.BASELINES)
      parser.error(f"--baselines {part}: no part of {known}")
    chosen |= names
  if arguments.plot:
    if not arguments.plot.is_file():
      parser.error(f"--plot {arguments.plot}: there is no such file")
    print(f"drawn to {plot(arguments.plot)}")
    return
  if jax.default_backend() == "cpu":
    device = f"CPU, {platform.machine()}, {multiprocessing.cpu_count()} cores"
    path = write("memory_cpu", device, _cpu(arguments.lengths or LENGTHS))
    print(f"written to {path}")
    return
  field = []
  for baseline in baselines.BASELINES:
    if baseline.name not in chosen:
      continue
    if baseline.installed:
      field.append(baseline)
    else:
      print(f"{baseline.name}: {baseline.package} is not installed")
  kind = jax.devices()[0].device_kind
  name = arguments.out or f"kernels_{kind.replace(' ', '_').lower()}"
  save = functools.partial(write, name, kind)
  lengths = arguments.lengths or LENGTHS[:-1]
  path = save(_gpu(lengths, arguments.widths, field, save))
  print(f"written to {path}")


if __name__ == "__main__":
  main()
