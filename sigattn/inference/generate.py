"""Continues texts with a trained language model.

  python -m sigattn generate --workdir=runs/lm_sigmoid/default \\
    --prompt="In the beginning" --temperature=0.7

prints the text while it is generated. With several --prompt flags, the prompts
are continued together and printed at the end.

  python -m sigattn generate --workdir=runs/lm_sigmoid/default \\
    --prompts=prompts.jsonl --out=texts.jsonl --stop=$'\\n'

continues each "prompt" of a file, see prompt_file.py. In a notebook:

  generator = Generator.load("runs/lm_sigmoid/default")
  [text] = generator(["In the beginning"], max_tokens=100)

The n of sigmoid attention stays the constant that the layer was built with,
however long the text becomes.
"""

import bisect
import dataclasses
import numbers
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from sigattn import interrupt
from sigattn.data import text
from sigattn.inference import batching, engine, prompt_file
from sigattn.inference.sampling import Sampling
from sigattn.training import checkpoint, process

CONTEXTS = ("full", "window")
CACHES = ("contiguous", "paged")
CACHE_DTYPES = (None, "float8_e4m3fn")


@dataclasses.dataclass(frozen=True)
class Options:
  """How texts are continued.

  max_tokens: the maximum number of new tokens of each prompt.
  seed: of the random draws. Prompt i draws its tokens with the key
    fold_in(key(seed), i), so that its text does not depend on the others.
  rows: how many prompts are continued at the same time; the next one begins
    where one has ended.
  stop: strings (or one string) that end a text; the text is cut before the
    first of them.
  context: "full" shows the model the whole text. If the text may grow beyond
    the length that the model was trained on (config.data.length), the log warns
    of it. "window" never shows the model more than that length: a text that
    grows beyond it is cut and read again, see batching.py.
  cache: "contiguous" gives each row the slots that the longest text needs.
    "paged" gives each row the pages that its own text needs, and reads a common
    beginning of prompts only once, see pages.py.
  cache_dtype: of the stored keys and values. None: that of the activations,
    config.dtype. "float8_e4m3fn" rounds them to 8 bits, which take half of the
    memory of 16; see attention.saturated.
  temperature, top_k, top_p: see Sampling.
  """

  max_tokens: int = 256
  seed: int = 0
  rows: int = 32
  stop: str | Sequence[str] = ()
  context: str = "full"
  cache: str = "contiguous"
  cache_dtype: str | None = None
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  @property
  def sampling(self) -> Sampling:
    """How a token is drawn."""
    return Sampling(self.temperature, self.top_k, self.top_p)

  @property
  def stops(self) -> tuple[str, ...]:
    """The stop strings."""
    return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

  def validate(self) -> None:
    """Raises ValueError for a value out of range."""
    self.sampling.validate()
    for name, least in (("max_tokens", 1), ("rows", 1), ("seed", None)):
      value = getattr(self, name)
      is_whole = isinstance(value, numbers.Integral)
      if not is_whole or (least is not None and value < least):
        at_least = "" if least is None else f" >= {least}"
        raise ValueError(f"{name}={value!r}; must be a whole number{at_least}")
    choices = dict(context=CONTEXTS, cache=CACHES, cache_dtype=CACHE_DTYPES)
    for name, names in choices.items():
      if getattr(self, name) not in names:
        raise ValueError(f"{name}={getattr(self, name)!r}; choose from {names}")
    for x in self.stops:
      if not isinstance(x, str) or not x:
        raise ValueError(f"stop={self.stop!r}; must be strings, none empty")


class Continuation(NamedTuple):
  """The text that continues a prompt, without the prompt.

  index: of the prompt. tokens: the number of tokens that were drawn for it. The
  tokens of a stop string are counted, and the end token is not.
  """

  index: int
  text: str
  tokens: int


class Generator:
  """A language model with its tokenizer: continues texts."""

  def __init__(
    self, config: ConfigDict, params: Any, *, release: bool = False
  ) -> None:
    """Prepares a model to generate.

    params: a nested dict of arrays. release: whether `params` is emptied, which
    saves memory, see engine.prepared. Raises ValueError if the config is not of
    the task "lm".
    """
    if config.task != "lm":
      raise ValueError(f"config.task={config.task!r}; must be 'lm'")
    self.tokenizer = text.tokenizer(config)
    self.length = config.data.length  # in tokens, of the training rows
    self.engine = engine.Engine(
      *engine.prepared(config, params, release),
      self.tokenizer.size,
      self.tokenizer.end,
    )

  @classmethod
  def load(
    cls, workdir: str | os.PathLike[str], step: int | str | None = None
  ) -> Self:
    """Loads the model of a run.

    workdir, step: as in checkpoint.load, which raises ValueError if there is no
    such run or step.
    """
    return cls.load_step(workdir, step)[0]

  @classmethod
  def load_step(
    cls, workdir: str | os.PathLike[str], step: int | str | None = None
  ) -> tuple[Self, int]:
    """As load, with the step of the checkpoint."""
    config, params, step = checkpoint.load(workdir, step)
    return cls(config, params, release=True), step

  def __call__(self, prompts: Sequence[str], **options: Any) -> list[str]:
    """Returns the continuation of each prompt, without the prompt.

    options: the fields of Options.

    Raises:
      ValueError: for a value out of range, or a prompt that the tokenizer
        cannot encode.
    """
    options = Options(**options)
    options.validate()
    done = self.each(self.encode(prompts), options)
    return [x.text for x in sorted(done)]

  def stream(self, prompt: str, **options: Any) -> Iterator[str]:
    """Returns an iterator of the continuation of one prompt, in pieces.

    The arguments and errors are those of __call__. Errors are raised, and
    warnings given, before the first piece is asked for.
    """
    options = Options(**options)
    news = self._continued(self.encode([prompt]), options)
    return self._pieces(news, options)

  def _pieces(self, news, options):
    ids, yielded = [], 0
    for new in news:
      ids += new.ids
      decoded = self._cut(ids, options.stops).text
      # A character may consist of several tokens. Its first bytes decode to
      # U+FFFD and are held back until the character is complete. Characters
      # that may begin a stop string are held back too.
      complete = len(decoded.rstrip("\ufffd"))
      complete -= _begun(decoded[:complete], options.stops)
      if new.ended:
        complete = len(decoded)
      yield decoded[yielded:complete]
      yielded = max(yielded, complete)

  def each(
    self,
    prompts: Sequence[np.ndarray],
    options: Options,
    first: int = 0,
  ) -> Iterator[Continuation]:
    """Yields the Continuation of each prompt, in the order in which they end.

    prompts: tokens, which `encode` returns. first: the index of the first one.
    Errors are those of __call__.
    """
    ids = {}
    for new in self._continued(prompts, options, first):
      ids.setdefault(new.index, []).extend(new.ids)
      if new.ended:
        done = self._cut(ids.pop(new.index), options.stops)
        yield done._replace(index=first + new.index)

  def encode(self, prompts: Sequence[str]) -> list[np.ndarray]:
    """The tokens of each prompt, after the token that starts a text.

    Raises ValueError for a prompt that the tokenizer cannot encode, and for a
    string in place of a list.
    """
    if isinstance(prompts, str):
      raise ValueError(
        f"prompts={prompts!r}; must be a list of prompts: give [prompt], or "
        "call `stream`, which takes one prompt"
      )
    for x in prompts:
      if not isinstance(x, str):
        raise ValueError(f"prompts: {x!r}; must be a string")
    start = np.array([self.tokenizer.start], np.int32)
    return [
      np.concatenate([start, x]) for x in self.tokenizer.encode(list(prompts))
    ]

  def _continued(self, prompts, options, first=0):
    """batching.continued with these options; there may be no prompts."""
    options.validate()
    if not prompts:
      return []
    is_window = options.context == "window"
    if not is_window:
      self._warn_beyond_training(prompts, options.max_tokens)
    return batching.continued(
      self.engine,
      prompts,
      rows=options.rows,
      max_tokens=options.max_tokens,
      sampling=options.sampling,
      keys=_keys(options.seed, first, len(prompts)),
      end=self.tokenizer.end,
      window=self.length if is_window else None,
      is_paged=options.cache == "paged",
      cache_dtype=options.cache_dtype,
      stopped=lambda ids: (
        bool(options.stops) and self._holds(ids, options.stops)
      ),
    )

  def _warn_beyond_training(self, prompts, max_tokens):
    # The last token that is drawn is not read.
    longest = max(map(len, prompts)) + max_tokens - 1
    if longest > self.length:
      logging.warning(
        "texts may grow to %d tokens with their prompts, but the model was "
        "trained on %d (config.data.length). Text beyond this length may make "
        "no sense. Lower --max_tokens, or give --context=window, which never "
        "shows the model more than this length",
        longest,
        self.length,
      )

  def _holds(self, ids, stops):
    decoded = self.tokenizer.decode(ids)
    return any(stop in decoded for stop in stops)

  def _cut(self, ids, stops):
    """The Continuation of these tokens up to the first stop string."""
    if stops and self._holds(ids, stops):
      # Keep the fewest tokens with a stop string. How many more were drawn
      # depends on when the host looked.
      count = bisect.bisect_left(
        range(len(ids)), True, key=lambda i: self._holds(ids[:i], stops)
      )
      ids = ids[:count]
    decoded = self.tokenizer.decode(ids)
    places = [decoded.find(stop) for stop in stops]
    place = min((x for x in places if x >= 0), default=len(decoded))
    return Continuation(0, decoded[:place], len(ids))


def _begun(decoded, stops):
  """How many characters at the end may be the beginning of a stop string."""
  return max(
    (
      size
      for stop in stops
      for size in range(1, len(stop))
      if decoded.endswith(stop[:size])
    ),
    default=0,
  )


def _keys(seed, first, count):
  """The key data of each prompt, uint32 (count, ...)."""
  fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  key_B = fold(jax.random.key(seed), first + np.arange(count))
  return jax.device_get(jax.random.key_data(key_B))


def define_flags() -> None:
  """Defines the flags of `python -m sigattn generate`, except shared ones."""
  flags.DEFINE_multi_string(
    "prompt", [""], "The text to continue; an empty one begins a new text"
  )
  flags.DEFINE_string(
    "prompts",
    None,
    'A file of JSON lines to continue, each an object with a "prompt".',
  )
  flags.DEFINE_string(
    "out",
    None,
    "The file for the results of --prompts. Results that it has are kept.",
  )
  flags.DEFINE_integer("max_tokens", 256, "Maximum number of new tokens.")
  flags.DEFINE_integer("rows", 32, "Prompts to continue at the same time.")
  flags.DEFINE_multi_string("stop", [], "A text ends before this string")
  flags.DEFINE_enum(
    "context",
    "full",
    CONTEXTS,
    "What the model sees: the whole text, or at most the trained length.",
  )
  flags.DEFINE_enum(
    "cache",
    "contiguous",
    CACHES,
    "How keys and values are stored. Pages take less memory for texts of "
    "different lengths, and store a common beginning of prompts once.",
  )
  flags.DEFINE_enum(
    "cache_dtype",
    None,
    [x for x in CACHE_DTYPES if x],
    "The dtype of the stored keys and values, by default that of the "
    "activations. 8 bits take half of the memory of 16, and are less precise.",
  )
  flags.DEFINE_float("temperature", 1.0, "0 takes the most likely token.")
  flags.DEFINE_integer(
    "top_k", 0, "Draw from the k most likely tokens; 0 draws from all."
  )
  flags.DEFINE_float(
    "top_p",
    1.0,
    "Draw from the most likely tokens with this total probability.",
  )
  flags.DEFINE_integer("seed", 0, "Seed of the random draws.")


def run(flag_values: flags.FlagValues) -> None:
  """Prints the prompts with their continuations, or writes them to --out."""
  names = [field.name for field in dataclasses.fields(Options)]
  options = {name: flag_values[name].value for name in names}
  Options(**options).validate()
  lower = (
    f"lower --rows={options['rows']}, --max_tokens={options['max_tokens']}"
  )
  with process.saying_what_to_lower(f"{lower} or the length of the prompts"):
    _run(flag_values, options)


def _run(flag_values, options):
  workdir, step = flag_values.workdir, flag_values.step
  if flag_values.prompts is not None or flag_values.out is not None:
    _continue_file(flag_values, Options(**options))
    return
  prompts = flag_values.prompt
  generator = Generator.load(workdir, step)
  if len(prompts) > 1:
    texts = generator(prompts, **options)
    for i, (prompt, continuation) in enumerate(
      zip(prompts, texts, strict=True), 1
    ):
      # An empty line alone may also be a part of a text.
      print(f"--- prompt {i} of {len(prompts)} ---", flush=True)
      print(f"{prompt}{continuation}\n", flush=True)
    return
  # This may raise or warn, so it comes before anything is printed.
  pieces = generator.stream(prompts[0], **options)
  print(prompts[0], end="", flush=True)
  try:
    for piece in pieces:
      print(piece, end="", flush=True)
      interrupt.check()
  finally:  # What follows begins a line, also after Ctrl-C.
    print(flush=True)


def _continue_file(flag_values, options):
  for one, other in (("prompts", "out"), ("out", "prompts")):
    if flag_values[other].value is None:
      raise ValueError(f"--{one} is given; needs --{other} as well")
  if flag_values["prompt"].present:
    raise ValueError("--prompt and --prompts are given; give one of them")
  work = prompt_file.PromptFile(flag_values.prompts, flag_values.out)
  generator, step = Generator.load_step(flag_values.workdir, flag_values.step)
  made_by = dataclasses.asdict(options) | {"stop": list(options.stops)}
  for name in ("rows", "cache"):  # They do not change texts.
    del made_by[name]
  work.run(
    generator.encode,
    lambda prompts, first: generator.each(prompts, options, first),
    {"workdir": os.path.realpath(flag_values.workdir), "step": step, **made_by},
  )
