"""Implementations of attention that the benchmark compares.

Those of other authors are optional: if one is not installed, it is skipped. For
a problem size (a Cell) a Baseline builds one callable per pass: a function
without arguments that starts the work on the GPU.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sigattn.kernels import dispatch

PASSES = ("forward", "backward", "both")


@dataclasses.dataclass(frozen=True)
class Cell:
  """A problem size: B = batch, T = S = length, N = K = heads, H = width."""

  width: int
  length: int
  batch: int
  heads: int
  causal: bool
  padding: float = 0.0  # share of the tokens that are padding

  @property
  def shape(self):
    return self.batch, self.length, self.heads, self.width

  @property
  def lengths(self):
    """Evenly spaced lengths (B,) with this share of padding, or None."""
    if not self.padding:
      return None
    spread = jnp.linspace(0.0, 2 * self.padding, self.batch)
    return jnp.round(self.length * (1 - spread)).astype(jnp.int32)

  def flops(self, direction):
    """4 B n^2 N H for a forward pass, and half of that if it is causal.

    A backward pass counts 2.5 times as much, and both together 3.5 times.
    """
    times = {"forward": 1.0, "backward": 2.5, "both": 3.5}[direction]
    square = self.batch * self.length**2 * self.heads * self.width
    return 4 * square * times * (0.5 if self.causal else 1.0)


@dataclasses.dataclass(frozen=True)
class Baseline:
  """One implementation: how to call its passes, and which sizes it supports."""

  name: str
  softmax: bool
  package: str  # the package that it needs
  calls: Callable  # Cell -> {pass: call}
  wait: Callable  # waits for the result of a call
  can: Callable = lambda cell: not cell.padding
  cudnn: bool = False
  normalize: bool = False  # rows divided by their sums

  @property
  def compiled(self):
    """Whether it can be compiled in several threads at the same time.

    XLA can, and its compilation takes long. cuDNN cannot: it captures a graph,
    which breaks if another thread launches a kernel.
    """
    return self.package in ("jax", "flash_attn3_jax") and not self.cudnn

  @property
  def installed(self):
    return importlib.util.find_spec(self.package) is not None


def _inputs(cell):
  keys = jax.random.split(jax.random.key(0), 4)
  return [jax.random.normal(key, cell.shape, "bfloat16") for key in keys]


def _jax_calls(attend, cell, *extra):
  """The calls of attend(query, key, value, *extra).

  Backward passes differentiate by all arguments.
  """
  *inputs, d_out = _inputs(cell)
  inputs += extra
  forward = jax.jit(attend)
  _, pullback = jax.vjp(forward, *inputs)
  # A call with the pullback itself would flatten it every time, which can take
  # longer than a short kernel runs.
  saved, structure = jax.tree.flatten(pullback)

  @jax.jit
  def backward(saved, d_out):
    return jax.tree.unflatten(structure, saved)(d_out)

  @jax.jit
  def both(d_out, *inputs):
    out, pullback = jax.vjp(attend, *inputs)
    return out, pullback(d_out)

  return {
    "forward": functools.partial(forward, *inputs),
    "backward": functools.partial(backward, saved, d_out),
    "both": functools.partial(both, d_out, *inputs),
  }


def _ours(
  implementation, cell, normalize=False, logit_bias=None, vectors=False
):
  """Sigmoid attention.

  logit_bias: None means -log n. vectors: whether each query and key has a
  trained number.
  """
  lengths = cell.lengths
  if logit_bias is None:
    logit_bias = -math.log(cell.length)

  def attend(query, key, value, *vectors):
    operands = dispatch.Operands(
      query_seq_lengths=lengths, key_value_seq_lengths=lengths
    )
    if vectors:
      of_queries, of_keys = vectors
      operands = operands._replace(
        query_logit_bias=of_queries, key_logit_bias=of_keys
      )
    out = dispatch.attention(
      query, key, value, operands, kind="sigmoid", scale=cell.width**-0.5,
      logit_bias=logit_bias, is_causal=cell.causal, normalize=normalize,
      implementation=implementation,
    )  # fmt: skip
    return out[0] if normalize else out

  if not vectors:
    return _jax_calls(attend, cell)
  shape = cell.batch, cell.heads, cell.length
  keys = jax.random.split(jax.random.key(1))
  return _jax_calls(attend, cell, *(jax.random.normal(k, shape) for k in keys))


def _jax_nn(implementation, cell):
  return _jax_calls(
    functools.partial(
      jax.nn.dot_product_attention,
      is_causal=cell.causal,
      implementation=implementation,
    ),
    cell,
  )


def _flash_3(cell):
  import flash_attn3_jax

  return _jax_calls(
    functools.partial(flash_attn3_jax.flash_mha, is_causal=cell.causal), cell
  )


def _torch_calls(attend, cell):
  """The calls of attend(query, key, value), whose arrays are (B, n, N, H)."""
  import torch

  torch.manual_seed(0)
  *inputs, d_out = (
    torch.randn(cell.shape, device="cuda", dtype=torch.bfloat16)
    for _ in range(4)
  )
  for x in inputs:
    x.requires_grad_()
  out = attend(*inputs)

  def forward():
    with torch.no_grad():
      return attend(*inputs)

  def backward():
    return torch.autograd.grad(out, inputs, d_out, retain_graph=True)

  def both():
    out = attend(*inputs)
    return out, torch.autograd.grad(out, inputs, d_out)

  return {"forward": forward, "backward": backward, "both": both}


def _torch_wait(_):
  import torch

  torch.cuda.synchronize()


def _torch_softmax(backend, cell):
  from torch.nn import attention
  from torch.nn.functional import scaled_dot_product_attention

  def attend(*inputs):
    inputs = [x.transpose(1, 2) for x in inputs]
    with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
      out = scaled_dot_product_attention(*inputs, is_causal=cell.causal)
    return out.transpose(1, 2)

  return _torch_calls(attend, cell)


def _triton_sigmoid(cell):
  import torch
  import triton_sigmoid

  # jax-triton empties this variable, and Triton does not run without it.
  if not os.environ.get("TRITON_CACHE_DIR"):
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
  attend = functools.partial(
    triton_sigmoid.sigmoid_attention, is_causal=cell.causal
  )
  if cell.padding:
    lengths = torch.tensor(
      cell.lengths.tolist(), device="cuda", dtype=torch.int32
    )
    attend = functools.partial(
      triton_sigmoid.sigmoid_attention_padded, seq_lens_k=lengths,
      seq_lens_q=lengths, is_causal=cell.causal,
    )  # fmt: skip
  return _torch_calls(attend, cell)


def _fits_in_memory(cell):
  """Whether n x n matrices fit in memory and finish quickly."""
  return not cell.padding and cell.batch * cell.heads * cell.length**2 < 2**30


def _any(cell):
  return True


_ready = jax.block_until_ready


def _sigattn(implementation, form="", can=_any, **options):
  """The Baseline of our attention. options: those of _ours."""
  return Baseline(
    f"sigattn {implementation}{form}",
    False,
    "jax_triton" if implementation == "triton" else "jax",
    functools.partial(_ours, implementation, **options),
    _ready,
    can,
    normalize=options.get("normalize", False),
  )


def _whole(cell):
  return not cell.padding


BASELINES = (
  _sigattn("mosaic"),
  _sigattn("triton"),
  _sigattn("mosaic", " normalized", normalize=True),
  _sigattn("triton", " normalized", normalize=True),
  _sigattn(
    "mosaic", " normalized, b = -14", _whole, normalize=True, logit_bias=-14.0
  ),
  _sigattn("mosaic", ", logit vectors", _whole, vectors=True),
  _sigattn("triton", ", logit vectors", _whole, vectors=True),
  Baseline(
    "TritonSigmoid", False, "triton_sigmoid", _triton_sigmoid, _torch_wait, _any
  ),
  Baseline(
    "cuDNN (jax.nn)",
    True,
    "jax",
    functools.partial(_jax_nn, "cudnn"),
    _ready,
    cudnn=True,
  ),
  Baseline(
    "cuDNN (torch)",
    True,
    "torch",
    functools.partial(_torch_softmax, "CUDNN_ATTENTION"),
    _torch_wait,
  ),
  Baseline(
    "FlashAttention-3",
    True,
    "flash_attn3_jax",
    _flash_3,
    _ready,
    lambda cell: not cell.padding and cell.width == 128,
  ),
  Baseline(
    "FlashAttention-2",
    True,
    "torch",
    functools.partial(_torch_softmax, "FLASH_ATTENTION"),
    _torch_wait,
  ),
  Baseline(
    "XLA (jax.nn)",
    True,
    "jax",
    functools.partial(_jax_nn, "xla"),
    _ready,
    _fits_in_memory,
  ),
)


def memory(baseline, cell):
  """{saved_mib, peak_mib} of a forward and backward pass, without its inputs.

  saved_mib: the memory that the forward pass saves besides query, key and
    value.
  peak_mib: the peak of output, gradients and temporary memory.
  """
  measure = _torch_memory if baseline.wait is _torch_wait else _jax_memory
  saved, peak = measure(baseline.calls(cell))
  inputs = 3 * math.prod(cell.shape) * 2
  return {
    "saved_mib": round((saved - inputs) / 2**20, 1),
    "peak_mib": round(peak / 2**20, 1),
  }


def _jax_memory(calls):
  both = calls["both"]
  needs = both.func.lower(*both.args).compile().memory_analysis()
  saved, _ = calls["backward"].args
  saved = sum(x.nbytes for x in saved)
  return saved, needs.temp_size_in_bytes + needs.output_size_in_bytes


def _torch_memory(calls):
  import torch

  saved = {}

  def keep(x):
    saved[x.data_ptr()] = x.nbytes
    return x

  both = calls["both"]
  both()
  torch.cuda.synchronize()
  before = torch.cuda.memory_allocated()
  torch.cuda.reset_peak_memory_stats()
  with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
    both()
  torch.cuda.synchronize()
  return sum(saved.values()), torch.cuda.max_memory_allocated() - before
