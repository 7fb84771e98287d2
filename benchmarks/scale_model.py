"""Models the step time of long rows on many GPUs.

`python -m benchmarks.scale_model` prints the tables of docs/scaling.md. The 1B
model of configs/lm.py trains on rows that are split over a ring of GPUs: a row
of 262,144 tokens on each host of 8 GPUs, or one of 1,048,576 tokens on all.

The model counts operations and bytes and divides by the rates below. What is
exchanged while the GPUs compute costs nothing as long as it takes less time.
"""

# Rates of one H100, rounded. benchmarks/NOTES.md has measurements of the first
# two. The other two are what we assume that links of 450 and 50 GB/s carry.
PRODUCTS = 600e12  # operations a second in products of bfloat16 matrices
ATTENTION = 500e12  # the same in attention, forward and backward
NVLINK = 400e9  # bytes a second that a GPU sends inside a host
NETWORK = 50e9  # bytes a second that a GPU sends to another host, 400 Gb/s
HOST = 8  # GPUs

PARAMETERS, LAYERS, WIDTH, HEAD_WIDTH = 1.3e9, 24, 2048, 64
SHORT, LONG = 262144, 1048576  # tokens of a row
GPUS = (8, 64, 512, 4096)

# The forward pass runs twice, because the backward pass recomputes it (remat).
_PRODUCT_PASSES = 2 + 2 + 4  # operations for each parameter and token
_FORWARD, _BACKWARD = 2, 2.5  # attention's passes, in forward passes


def attention_seconds(ring: int, length: int) -> float:
  """Seconds of a causal forward pass of one layer, on each GPU of the ring.

  4 n^2 D / 2 operations for the whole row of n tokens.
  """
  return 4 * length**2 * WIDTH / 2 / ring / ATTENTION


def ring_bytes(ring: int, length: int, is_backward: bool) -> float:
  """Bytes that each GPU sends in one layer.

  Forward: keys and values of a block in bfloat16, ring - 1 times. Backward: the
  same, and also their gradients in float32, ring times.
  """
  block = length / ring * WIDTH
  keys = (ring - 1) * 2 * 2 * block
  return keys + ring * 2 * 4 * block if is_backward else keys


def bandwidth(ring: int) -> float:
  """Bytes per second of the slowest link of a ring. All others wait for it."""
  return NVLINK if ring <= HOST else NETWORK


def row(gpus: int, ring: int, length: int) -> dict[str, float]:
  """The parts of a step, in seconds, of `gpus` GPUs in rings of `ring`.

  length: the tokens of each ring's row.

  attention: the time of attention, or of the exchange of keys and values where
  that takes longer. exposed: the time by which the exchange takes longer.
  gradients: the sum of the gradients over all GPUs, in float32, after the
  backward pass. Every host sends twice their bytes over all of its links.
  """
  forward = attention_seconds(ring, length)
  attention = exposed = 0.0
  for passes, is_backward in ((_FORWARD, False), (_BACKWARD, True)):
    compute = passes * forward
    count = 1 if is_backward else passes
    sent = count * ring_bytes(ring, length, is_backward) / bandwidth(ring)
    attention += LAYERS * max(compute, sent)
    exposed += LAYERS * max(sent - compute, 0.0)
  products = _PRODUCT_PASSES * PARAMETERS * length / ring / PRODUCTS
  links = HOST * NETWORK if gpus > HOST else NVLINK
  gradients = 2 * 4 * PARAMETERS / links
  step = products + attention + gradients
  return {
    "gpus": gpus,
    "ring": ring,
    "n": length,
    "products": products,
    "attention": attention,
    "exposed": exposed,
    "gradients": gradients,
    "step": step,
    "busy": 1 - (exposed + gradients) / step,
  }


def rows() -> list[dict[str, float]]:
  """The rows of the table: rings of one host, then one ring of all GPUs."""
  return [row(gpus, HOST, SHORT) for gpus in GPUS] + [
    row(gpus, gpus, LONG) for gpus in GPUS
  ]


def hidden_from(bytes_a_second: float, group: int = 1) -> float:
  """The tokens per GPU above which a forward pass hides the exchange.

  With T tokens per GPU a step of the ring sends 4 T D / group bytes and
  computes 2 T^2 D operations. `group` query heads share a key head.
  """
  return 2 * ATTENTION / bytes_a_second / group


def markdown() -> str:
  """The table of step times of docs/scaling.md."""
  lines = [
    "| GPUs | GPUs in a ring | n | products | attention | exposed exchange "
    "| gradients | step | busy |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
  ]
  for x in rows():
    seconds = (
      f"{x[name]:,.3g} s" if x[name] < 1000 else f"{x[name]:,.0f} s"
      for name in ("products", "attention", "exposed", "gradients", "step")
    )
    lines.append(
      f"| {x['gpus']:,} | {x['ring']:,} | {x['n']:,} | {' | '.join(seconds)} "
      f"| {x['busy']:.1%} |"
    )
  return "\n".join(lines)


def row_bytes() -> list[tuple[str, int, int, int]]:
  """(what, bytes of softmax, plain sigmoid, normalised sigmoid).

  The bytes are of one layer on each of 8 GPUs, for a row of SHORT tokens,
  without q, k, v and the sum of the outputs. Arrays are bfloat16; the numbers
  per row are float32.
  """
  tokens = SHORT // HOST
  out, number = tokens * WIDTH * 2, tokens * (WIDTH // HEAD_WIDTH) * 4
  return [
    ("carried from block to block, forward", 2 * number, 0, number),
    ("saved for the backward pass", out + number, 0, out + number),
    ("read with every block, backward", 2 * number, 0, out + number),
    ("sent with every block of keys", 0, 0, 0),
    ("sent where outputs are added up, and keys stay", 2 * number, 0, number),
  ]


def bytes_markdown() -> str:
  """The table of bytes of docs/scaling.md."""
  lines = [
    "| | softmax | sigmoid | normalised sigmoid |",
    "| --- | --- | --- | --- |",
  ]
  for what, *counts in row_bytes():
    shown = (f"{x / 2**20:,.0f} MiB" if x else "0" for x in counts)
    lines.append(f"| {what} | {' | '.join(shown)} |")
  return "\n".join(lines)


if __name__ == "__main__":
  print(bytes_markdown(), markdown(), sep="\n\n")
