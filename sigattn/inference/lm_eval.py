"""Evaluates a language model on tasks of EleutherAI's lm-evaluation-harness.

  python -m sigattn lm_eval --workdir=runs/my_model \\
    --tasks=hellaswag,arc_easy,arc_challenge,piqa,sciq,winogrande,lambada_openai

prints the harness's table and writes its numbers to lm_eval.json in the run's
folder. In a notebook:

  lm_eval.simple_evaluate(HarnessLM(config, params), tasks=[...])
"""

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

from sigattn import extras

extras.require("eval")

import jax
import jax.numpy as jnp
import lm_eval
import lm_eval.tasks
import lm_eval.utils
import numpy as np
from absl import flags
from flax import nnx
from lm_eval.api import model as harness
from lm_eval.api.instance import Instance
from ml_collections import ConfigDict

from sigattn.inference.generate import Generator
from sigattn.training import checkpoint, files, metrics, setup

_MAX_NEW = 256  # tokens to generate for a task that sets no limit


class HarnessLM(harness.TemplateLM):
  """A language model of this library, wrapped for the harness.

  Every text begins with the tokenizer's `start` token, as the training
  documents do.
  """

  def __init__(
    self,
    config: ConfigDict,
    params: Any,
    *,
    batch_size: int = 16,
    max_length: int | None = None,
  ) -> None:
    """Wraps a model.

    Args:
      config: of the run.
      params: its parameters, a nested dict of arrays.
      batch_size: the number of texts that are scored or continued at once.
      max_length: in tokens; longer texts lose their beginning. None means
        config.data.length.
    """
    super().__init__()
    self._generator = Generator(config, params)
    self._tokenizer = self._generator.tokenizer
    self._batch_size = batch_size
    self._max_length = max_length or config.data.length
    self._params = params
    static = setup.graphdef(config)

    @jax.jit
    def score(params, token_BT):
      """Log-probability of each next token, and whether it is the argmax."""
      logits_BTV = nnx.merge(static, params)(token_BT[:, :-1])
      target_BT = jnp.maximum(token_BT[:, 1:], 0)
      log_p_BTV = jax.nn.log_softmax(logits_BTV)
      log_p_BT1 = jnp.take_along_axis(log_p_BTV, target_BT[..., None], axis=-1)
      return log_p_BT1[..., 0], logits_BTV.argmax(-1) == target_BT

    self._score = score

  @property
  def eot_token_id(self) -> int:
    """The token that ends a document."""
    return self._tokenizer.end

  @property
  def prefix_token_id(self) -> int:
    """The token that starts a document."""
    return self._tokenizer.start

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **_: object
  ) -> list[int]:
    """The tokens of a text; `start` first unless add_special_tokens=False."""
    [ids] = self._tokenizer.encode([string])
    start = [] if add_special_tokens is False else [self._tokenizer.start]
    return [*start, *ids.tolist()]

  def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
    """(log-probability, whether greedy decoding gives it) per continuation.

    requests: (_, tokens of the context, tokens of the continuation) each.
    """
    del disable_tqdm
    pairs = [(context, continuation) for _, context, continuation in requests]
    scores = [None] * len(pairs)
    # Batches have texts of similar length, so that there is little padding.
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    for batch in itertools.batched(order, self._batch_size):
      batch_scores = self._score_pairs([pairs[i] for i in batch])
      for i, score in zip(batch, batch_scores, strict=True):
        scores[i] = score
    return scores

  def _score_pairs(self, pairs):
    """Scores of one batch of (context, continuation) pairs of token lists."""
    rows = [(*a, *b)[-self._max_length - 1 :] for a, b in pairs]
    length = 1 << (max(map(len, rows)) - 1).bit_length()
    token_BT = np.full((self._batch_size, length + 1), -1, np.int32)
    for row, ids in zip(token_BT, rows, strict=False):
      row[: len(ids)] = ids
    log_p_BT, correct_BT = jax.device_get(self._score(self._params, token_BT))
    scores = []
    for i, ((_, continuation), ids) in enumerate(zip(pairs, rows, strict=True)):
      last = len(ids) - 1  # the number of targets: one less than tokens
      part = slice(max(last - len(continuation), 0), last)
      scores.append(
        (float(log_p_BT[i, part].sum()), bool(correct_BT[i, part].all()))
      )
    return scores

  def loglikelihood_rolling(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """The log-probability of each whole text, in nats.

    A text longer than max_length is scored in windows, each of whose tokens
    counts once.
    """
    log_probs = []
    for request in requests:
      [string] = request.args
      windows = lm_eval.utils.get_rolling_token_windows(
        self.tok_encode(string, add_special_tokens=False),
        prefix_token=self.prefix_token_id,
        max_seq_len=self._max_length,
        context_len=1,
      )
      pairs = [lm_eval.utils.make_disjoint_window(window) for window in windows]
      scores = self._loglikelihood_tokens([(None, *pair) for pair in pairs])
      log_probs.append(sum(score for score, _ in scores))
    return log_probs

  def generate_until(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[str]:
    """The greedy or sampled continuation of each context.

    It ends before the first of the request's stop strings.
    """
    del disable_tqdm
    texts = [None] * len(requests)
    groups = {}
    for i, request in enumerate(requests):
      context, options = request.args
      groups.setdefault(repr(sorted(options.items())), []).append(i)
    for group in groups.values():
      for batch in itertools.batched(group, self._batch_size):
        contexts = [requests[i].args[0] for i in batch]
        batch_texts = self._until(contexts, dict(requests[batch[0]].args[1]))
        for i, text in zip(batch, batch_texts, strict=True):
          texts[i] = text
    return texts

  def _until(self, contexts, options):
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    temperature = options.get("temperature", 0.0)
    chunks = self._generator.tokens(
      contexts,
      max_tokens=options.get("max_gen_toks", _MAX_NEW),
      chunk=16,
      temperature=temperature if options.get("do_sample") else 0.0,
      top_k=options.get("top_k", 0) or 0,
      top_p=options.get("top_p", 1.0),
    )
    ids = [[] for _ in contexts]
    texts = [""] * len(contexts)
    for chunk in chunks:
      for row, new in zip(ids, chunk, strict=True):
        row.extend(new.tolist())
      texts = [self._tokenizer.decode(row) for row in ids]
      if stops and all(any(stop in text for stop in stops) for text in texts):
        break
    for stop in stops:
      texts = [text.split(stop, 1)[0] for text in texts]
    return texts


def define_flags() -> None:
  """Defines the flags of `python -m sigattn lm_eval`, except shared ones."""
  flags.DEFINE_list("tasks", None, "Names of the harness's tasks.")
  flags.DEFINE_integer(
    "num_fewshot", None, "Number of examples in the context."
  )
  flags.DEFINE_integer("limit", None, "Use only the first examples of a task.")
  flags.DEFINE_integer("batch_size", 16, "Texts per batch.")
  flags.DEFINE_integer(
    "max_length", None, "In tokens; by default config.data.length."
  )
  flags.DEFINE_string("include_path", None, "A folder with your own tasks.")
  flags.mark_flag_as_required("tasks")


def run(flag_values: flags.FlagValues) -> None:
  """Prints the harness's table and writes its numbers to lm_eval.json."""
  metrics.set_up_logs()
  config, params, step = checkpoint.load(flag_values.workdir, flag_values.step)
  model = HarnessLM(
    config,
    params,
    batch_size=flag_values.batch_size,
    max_length=flag_values.max_length,
  )
  results = lm_eval.simple_evaluate(
    model,
    tasks=flag_values.tasks,
    num_fewshot=flag_values.num_fewshot,
    limit=flag_values.limit,
    task_manager=lm_eval.tasks.TaskManager(
      include_path=flag_values.include_path
    ),
  )
  print(lm_eval.utils.make_table(results))
  with metrics.saying_what_is_not_written():
    files.write_json(
      pathlib.Path(flag_values.workdir) / "lm_eval.json",
      {"step": step, "results": results["results"]},
    )
