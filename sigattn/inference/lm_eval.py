"""Evaluates a language model on tasks of EleutherAI's lm-evaluation-harness.

  python -m sigattn lm_eval --workdir=runs/my_model \\
    --tasks=hellaswag,arc_easy,arc_challenge,piqa,sciq,winogrande,lambada_openai

prints the harness's table and writes its numbers to lm_eval.json in the run's
folder. In a notebook:

  lm_eval.simple_evaluate(HarnessLM(Generator.load(workdir)), tasks=[...])
"""

import difflib
import itertools
import pathlib
from collections.abc import Sequence

from sigattn import extras

extras.require("eval")

import jax
import lm_eval
import lm_eval.tasks
import lm_eval.utils
import numpy as np
from absl import flags, logging
from lm_eval.api import model as harness
from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs

from sigattn.inference.generate import Generator, Options
from sigattn.training import files, metrics

_MAX_NEW = 256  # tokens to generate for a task that sets no limit


class HarnessLM(harness.TemplateLM):
  """A language model of this library, wrapped for the harness.

  Every text begins with the tokenizer's `start` token, as the training
  documents do.
  """

  def __init__(
    self,
    generator: Generator,
    *,
    batch_size: int = 16,
    max_length: int | None = None,
  ) -> None:
    """Wraps a model.

    Args:
      generator: the model with its tokenizer.
      batch_size: the number of texts that are scored or continued at once.
      max_length: the most tokens that the model sees; longer texts lose their
        beginning. None means config.data.length.

    Raises:
      ValueError: for a number below 1.
    """
    super().__init__()
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
      if value is not None and value < 1:
        raise ValueError(f"{name}={value}; must be >= 1")
    self._generator, self._tokenizer = generator, generator.tokenizer
    self._batch_size = batch_size
    self._max_length = max_length or generator.length

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
    """Returns (log-probability, is_greedy) for each continuation.

    is_greedy is whether greedy decoding gives the continuation. requests:
    tuples (_, tokens of the context, tokens of the continuation). A context is
    cut so that it fits into max_length with its continuation. A continuation
    longer than max_length is refused. The harness's own model for transformers
    does the same.
    """
    del disable_tqdm
    pairs = [(context, continuation) for _, context, continuation in requests]
    self._validate_lengths(pairs)
    scores = [None] * len(pairs)
    # Batches have texts of similar length, so that there is little padding.
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    for batch in itertools.batched(order, self._batch_size):
      batch_scores = self._score_pairs([pairs[i] for i in batch])
      for i, score in zip(batch, batch_scores, strict=True):
        scores[i] = score
    return scores

  def _validate_lengths(self, pairs):
    longest = max((len(b) for _, b in pairs), default=0)
    if longest > self._max_length:
      raise ValueError(
        f"a continuation has {longest} tokens; must have at most "
        f"max_length={self._max_length}, the most that the model sees"
      )
    # The last token is predicted, but not read.
    cut = sum(len(a) + len(b) - 1 > self._max_length for a, b in pairs)
    self._warn_of_cut(cut, len(pairs), self._max_length)

  def _warn_of_cut(self, cut, count, length):
    if cut:
      logging.warning(
        "%d of %d contexts lose their beginning: the model sees at most "
        "max_length=%d tokens, of which the context may have %s",
        cut,
        count,
        self._max_length,
        "what its continuation leaves"
        if length == self._max_length
        else f"{length}",
      )

  def _score_pairs(self, pairs):
    """Scores of one batch of (context, continuation) pairs of token lists."""
    rows = [(*a, *b)[-self._max_length - 1 :] for a, b in pairs]
    length = 1 << (max(map(len, rows)) - 2).bit_length()
    token_BT = np.full((self._batch_size, length + 1), -1, np.int32)
    for row, ids in zip(token_BT, rows, strict=False):
      row[: len(ids)] = ids
    scored = jax.device_get(self._generator.engine.score(token_BT))
    scores = []
    for i, ((_, continuation), ids) in enumerate(zip(pairs, rows, strict=True)):
      last = len(ids) - 1  # the number of targets: one less than tokens
      part = slice(last - len(continuation), last)
      log_p_T, correct_T = (x[i, part] for x in scored)
      scores.append((float(log_p_T.sum()), bool(correct_T.all())))
    return scores

  def loglikelihood_rolling(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """The log-probability of each whole text, in nats.

    A text longer than max_length is scored in windows, and each of its tokens
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

    It ends before the first of the request's stop strings. A context is cut to
    its last max_length - max_gen_toks tokens, so that text and continuation fit
    into max_length. Raises ValueError where that leaves no token.
    """
    del disable_tqdm
    texts = [None] * len(requests)
    groups = {}
    for i, request in enumerate(requests):
      options = normalize_gen_kwargs(request.args[1], _MAX_NEW)
      groups.setdefault(repr(sorted(options.items())), (options, []))[1].append(
        i
      )
    for options, group in groups.values():
      contexts = [requests[i].args[0] for i in group]
      for done in self._until(contexts, options):
        texts[group[done.index]] = done.text
    return texts

  def _until(self, contexts, options):
    count = options["max_gen_toks"]
    most = self._max_length - count
    if most < 1:
      raise ValueError(
        f"max_gen_toks={count}; must be less than max_length="
        f"{self._max_length}, so that a context fits before the new tokens"
      )
    prompts = self._generator.encode(contexts)
    self._warn_of_cut(sum(len(x) > most for x in prompts), len(prompts), most)
    return self._generator.each(
      [x[-most:] for x in prompts],
      Options(
        max_tokens=count,
        rows=self._batch_size,
        stop=[x for x in options["until"] if x],
        temperature=options.get("temperature", 1.0)
        if options["do_sample"]
        else 0.0,
        top_k=options.get("top_k") or 0,
        top_p=options.get("top_p") or 1.0,
      ),
    )


def define_flags() -> None:
  """Defines the flags of `python -m sigattn lm_eval`, except shared ones."""
  flags.DEFINE_list("tasks", None, "Names of the harness's tasks.")
  flags.DEFINE_integer(
    "num_fewshot", None, "Number of examples in the context.", 0
  )
  flags.DEFINE_integer(
    "limit", None, "Use only the first examples of a task.", 1
  )
  flags.DEFINE_integer("batch_size", 16, "Texts per batch.")
  flags.DEFINE_integer(
    "max_length", None, "In tokens; by default config.data.length."
  )
  flags.DEFINE_string("include_path", None, "A folder with your own tasks.")
  flags.mark_flag_as_required("tasks")


def _task_manager(names, include_path):
  """The harness's tasks. Raises ValueError for a task or a folder unknown."""
  if include_path is not None and not pathlib.Path(include_path).is_dir():
    raise ValueError(f"--include_path={include_path}; there is no such folder")
  manager = lm_eval.tasks.TaskManager(include_path=include_path)
  known = manager.all_tasks
  for name in names or [""]:
    if name not in known and not pathlib.Path(name).expanduser().is_file():
      near = ", ".join(difflib.get_close_matches(name, known, 3))
      hint = f"did you mean {near}?" if near else "--include_path adds your own"
      raise ValueError(
        f"--tasks={name}; is no task of lm-evaluation-harness and no file; "
        f"{hint}"
      )
  return manager


def run(flag_values: flags.FlagValues) -> None:
  """Prints the harness's table and writes its numbers to lm_eval.json."""
  metrics.set_up_logs()
  manager = _task_manager(flag_values.tasks, flag_values.include_path)
  generator, step = Generator.load_step(flag_values.workdir, flag_values.step)
  model = HarnessLM(
    generator,
    batch_size=flag_values.batch_size,
    max_length=flag_values.max_length,
  )
  results = lm_eval.simple_evaluate(
    model,
    tasks=flag_values.tasks,
    num_fewshot=flag_values.num_fewshot,
    limit=flag_values.limit,
    task_manager=manager,
  )
  print(lm_eval.utils.make_table(results))
  with metrics.saying_what_is_not_written():
    files.write_json(
      pathlib.Path(flag_values.workdir) / "lm_eval.json",
      {"step": step, "results": results["results"]},
    )
