"""Many texts in a few rows; windows, stop strings, and files of prompts."""

import functools
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigattn import attention
from sigattn.data import text
from sigattn.inference import engine, generate, pages, prompt_file
from sigattn.tasks import lm
from sigattn.training import setup
from tests.tasks.small_lm import ALIBI, GATE, SINES, small
from train import train

PROMPTS = [
  "And God said, ",
  "Let",
  "In the beginning was the word, and the word was",
  "",
  "earth",
]
LENGTH = 32  # config.data.length of `small`


def make(**values):
  """A Generator, and a function: LENGTH tokens, index -> the logits after it.

  The logits differ more than those of initial parameters, and greedy texts do
  not end.
  """
  config = small(**values)
  _, params = setup.init(config)
  params = jax.tree.map(lambda x: 2 * x, params)
  end = text.tokenizer(config).end
  params["embed"] = params["embed"].at[end].set(0)
  after = jax.jit(lambda p, x_T, i: setup.model(config, p)(x_T[None])[0, i])
  return generate.Generator(config, params), functools.partial(after, params)


@pytest.fixture(scope="module")
def generator():
  return make(**ALIBI)[0]


def test_a_text_is_the_same_alone_in_a_batch_and_taking_turns(generator):
  for temperature in (0, 1):
    options = {"max_tokens": 20, "temperature": temperature}
    whole = generator(PROMPTS, **options)
    options["stop"] = [whole[0][5], whole[1][11]]
    batch = generator(PROMPTS, **options)
    assert len({len(x) for x in batch}) > 1, "rows end at different times"
    assert generator(PROMPTS, rows=2, **options) == batch
    tokens = generator.encode(PROMPTS)
    for i in (0, 3):
      [alone] = generator.each(
        tokens[i : i + 1], generate.Options(**options), first=i
      )
      assert alone.text == batch[i]
      assert alone.index == i
  assert generator(PROMPTS, seed=1, **options) != batch


def test_long_prompts_are_read_into_a_row_part_by_part(generator, monkeypatch):
  options = {"max_tokens": 6, "temperature": 0}
  prompts = [PROMPTS[2] * 2, "Let", PROMPTS[2] * 3, PROMPTS[2], "earth" * 9]
  expected = generator(prompts, **options)
  monkeypatch.setattr(engine, "_LONGEST_PART", 16)
  monkeypatch.setattr(engine, "_PART", 32)
  assert generator(prompts, rows=3, **options) == expected


@pytest.mark.parametrize(
  "values",
  [ALIBI, SINES, {"attn.alibi": False}, {"attn.alibi": False} | GATE],
  ids=["alibi", "sines", "rope", "gate"],
)
def test_a_window_shows_the_model_no_more_than_it_was_trained_on(values):
  generator, after = make(**values)
  count, prompts = 40, [PROMPTS[1], PROMPTS[2]]

  def slowly(ids):
    """Continues ids by the whole forward pass over all visible tokens."""
    ids, first, new = ids.tolist(), 0, []
    for left in range(count, 0, -1):
      if len(ids) - first > LENGTH:
        first = len(ids) - max(LENGTH // 2, LENGTH + 1 - left)
      seen = ids[first:]
      padded = np.pad(np.array(seen, np.int32), (0, LENGTH - len(seen)))
      logits_V = after(padded, len(seen) - 1)
      ids.append(int(logits_V[: generator.tokenizer.size].argmax()))
      new.append(ids[-1])
    return generator.tokenizer.decode(new)

  expected = [slowly(x) for x in generator.encode(prompts)]
  options = {"max_tokens": count, "temperature": 0, "context": "window"}
  assert generator(prompts, **options) == expected
  assert generator(prompts, rows=1, **options) == expected


def test_one_warning_tells_that_texts_grow_beyond_the_training(
  generator, caplog
):
  # "Let" comes after the token that starts a text.
  generator(["Let", ""], max_tokens=LENGTH - 3)
  generator(["Let"], max_tokens=60, context="window")
  assert not caplog.messages
  generator(["Let", ""], max_tokens=LENGTH - 2)
  [message] = caplog.messages
  assert f"{LENGTH + 1} tokens" in message
  assert f"trained on {LENGTH}" in message


def test_a_text_ends_before_its_first_stop_string(generator):
  options = {"max_tokens": 24, "temperature": 1, "seed": 3}
  [whole] = generator(["Let"], **options)
  stop = [whole[12:15], whole[9:11], "not there"]
  place = min(whole.find(x) for x in stop[:2])
  assert place > 0
  assert generator(["Let"], stop=stop, **options) == [whole[:place]]
  assert generator(["Let"], stop=stop[1], **options) == [
    whole[: whole.find(stop[1])]
  ]
  pieces = list(generator.stream("Let", stop=stop, **options))
  assert "".join(pieces) == whole[:place]
  # The tokens of the stop string count, and those after it do not.
  [done] = generator.each(
    generator.encode(["Let"]), generate.Options(stop=whole[9:11], **options)
  )
  assert done.tokens == whole.find(whole[9:11]) + 2
  with pytest.raises(ValueError, match="none empty"):
    generator(["Let"], stop=["a", ""])


def lines(path):
  return [json.loads(x) for x in path.read_text().splitlines()]


def test_a_file_that_was_stopped_goes_on_with_the_same_texts(
  generator, tmp_path, capsys
):
  path, out, whole = (tmp_path / x for x in ("in", "out", "whole"))
  path.write_text(
    "".join(json.dumps({"prompt": x, "id": x[:1]}) + "\n" for x in PROMPTS)
  )
  options = generate.Options(max_tokens=20, rows=2, stop=tuple("aeou"))

  def each(prompts, first):
    return generator.each(prompts, options, first)

  def run(out, each, **more):
    made_by = {"workdir": "runs/a", "step": 3, **more}
    prompt_file.PromptFile(path, out).run(generator.encode, each, made_by)

  run(whole, each)
  texts = generator(PROMPTS, max_tokens=20, stop=tuple("aeou"))
  assert [x["text"] for x in lines(whole)] == texts
  assert [x["prompt"] for x in lines(whole)] == PROMPTS
  assert [x["id"] for x in lines(whole)] == [x[:1] for x in PROMPTS]
  assert all(x["tokens"] >= len(x["text"]) for x in lines(whole))
  assert "tokens/s" in capsys.readouterr().out

  def stopped(prompts, first):
    yield from itertools.islice(each(prompts, first), 4)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt) as caught:
    run(out, stopped)
  before = lines(out)
  assert 0 < len(before) < 5
  assert f"holds {len(before)} of 5" in str(caught.value)
  with out.open("a") as file:
    file.write('{"prompt": "cut by a kill')
  with pytest.raises(
    ValueError, match=r"were made with step=3 and not 4 \(.*options\.json\): re"
  ):
    run(out, each, step=4)
  run(out, each)
  assert out.read_text() == whole.read_text()
  run(out, each)
  assert out.read_text() == whole.read_text()
  pathlib.Path(f"{out}.options.json").unlink()
  with pytest.raises(ValueError, match=r"options\.json, which says what made"):
    run(out, each)
  path.write_text(path.read_text().replace("Let", "Led"))
  with pytest.raises(ValueError, match=r"out, line 2: .* another --out"):
    prompt_file.PromptFile(path, out)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{'prompt': 1}", "not a line of JSON"),
    ("", "not a line of JSON"),
    ("[1]", "must be an object such as"),
    ('{"text": "a"}', 'no field "prompt"'),
    ('{"prompt": 3}', "prompt=3; must be a string"),
    ('{"prompt": "a", "tokens": 3}', "'tokens'"),
    ('{"prompt": "\\ud800"}', "UTF-8"),
    ('{"prompt": "Ω"}', "characters"),
  ],
)
def test_an_error_names_the_line_of_the_file(
  generator, tmp_path, line, message
):
  path, out = tmp_path / "in", tmp_path / "out"
  path.write_text('{"prompt": "Let"}\n' + line + "\n")
  with pytest.raises(ValueError, match=f"in, line 2: .*{message}"):
    prompt_file.PromptFile(path, out).run(
      generator.encode, lambda *_: iter(()), {}
    )
  assert not out.exists()


def test_a_run_is_loaded_into_little_memory_and_continues_a_file(
  tmp_path, monkeypatch
):
  config = small(**ALIBI, **{"model.width": 24})
  config.dtype = "bfloat16"
  train(config, tmp_path / "run")
  alive = []
  prepare = lm.LanguageModel.prepare_to_generate

  def spy(model):
    arrays = [(x.shape, str(x.dtype)) for x in jax.live_arrays()]
    alive.append(((64, 24), "float32") in arrays)
    prepare(model)

  monkeypatch.setattr(lm.LanguageModel, "prepare_to_generate", spy)
  generator = generate.Generator.load(tmp_path / "run")
  assert not alive[-1], "the float32 embedding is there beside its copy"
  path, out = tmp_path / "in", tmp_path / "out"
  path.write_text("".join(json.dumps({"prompt": x}) + "\n" for x in PROMPTS))
  done = subprocess.run(
    [
      sys.executable, "-m", "sigattn", "generate",
      f"--workdir={tmp_path / 'run'}", f"--prompts={path}", f"--out={out}",
      "--max_tokens=40", "--temperature=0", "--rows=2", "--stop=q", "--stop=zz",
      "--context=window", "--cache_dtype=float8_e4m3fn",
    ],
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  expected = generator(
    PROMPTS, max_tokens=40, temperature=0, rows=2, stop=["q", "zz"],
    context="window", cache_dtype="float8_e4m3fn",
  )  # fmt: skip
  assert [x["text"] for x in lines(out)] == expected
  refused = subprocess.run(
    [
      sys.executable, "-m", "sigattn", "generate",
      f"--workdir={tmp_path / 'run'}", f"--prompts={path}", f"--out={out}",
      "--max_tokens=9",
    ],
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert refused.returncode == 1
  [line] = refused.stderr.splitlines()
  assert "5 results were made with max_tokens=40 and not 9, stop=[" in line


def test_a_wrong_place_of_the_results_is_named(tmp_path):
  path = tmp_path / "in"
  path.write_text('{"prompt": "Let"}\n')
  for out, said in (
    (path, rf"--out={path}: is the file of --prompts; name another"),
    (tmp_path, "is a folder; name a file"),
    ("no/x", "--out=no/x: there is no folder 'no'"),
  ):
    with pytest.raises(ValueError, match=said):
      prompt_file.PromptFile(path, out)


COMMON = "In the beginning God created the heaven and the earth. " * 2


@pytest.mark.parametrize("values", [ALIBI, ALIBI | GATE], ids=["", "gate"])
def test_pages_give_the_texts_that_slots_give(values):
  generator, _ = make(**values)
  prompts = [COMMON + "And", "Let", COMMON[:70] + "zz", COMMON + "And"]
  options = {"max_tokens": 20, "temperature": 0, "stop": list("aeou")}
  expected = generator(prompts, **options)
  for rows in (4, 1):
    assert generator(prompts, rows=rows, cache="paged", **options) == expected
  options = {"max_tokens": 60, "temperature": 0, "context": "window"}
  expected = generator(prompts, **options)
  assert generator(prompts, rows=2, cache="paged", **options) == expected
  with pytest.raises(ValueError, match="cache='pages'"):
    generator(prompts, cache="pages")


def test_a_cache_in_8_bits_gives_the_texts_of_one_rounded_by_hand(
  generator, monkeypatch
):
  """With pages, the third prompt reads only what differs from the first one."""
  prompts = [COMMON + "And", "Let", COMMON + "zz"]
  options = {"max_tokens": 40, "temperature": 0}
  whole = generator(prompts, **options)
  texts = [
    generator(prompts, cache_dtype="float8_e4m3fn", **x, **options)
    for x in ({}, {"cache": "paged"})
  ]

  def rounded(x, dtype):
    del dtype  # It is float32, that of the cache.
    step = jnp.ldexp(1.0, jnp.maximum(jnp.frexp(x)[1] - 4, -9))
    return jnp.clip(jnp.round(x / step) * step, -448, 448)

  monkeypatch.setattr(attention, "saturated", rounded)
  by_hand, _ = make(**ALIBI)
  assert texts == 2 * [by_hand(prompts, **options)]
  assert texts[0] != whole
  with pytest.raises(ValueError, match="cache_dtype='fp8'; choose from .*None"):
    generator(prompts, cache_dtype="fp8")


def test_rows_have_the_pages_that_they_need_and_share_full_ones():
  text_T = np.arange(200)
  # All begin with 130 tokens: two pages are full.
  held = pages.Pages.for_prompts([200, 330, 150, 135], common=130, rows=2)
  assert held.count == 1 + 2 + 4 + 2
  assert held.take(0, text_T, 330) == (0, 0)
  # This prompt waits until those of the first row have been read.
  assert held.take(1, text_T[:140], 200) == (128, 1)
  held.have_been_read()
  first, second = held.table_BM
  assert first[:2].tolist() == second[:2].tolist()
  assert not set(first[2:6]) & set(second[2:4])
  assert (first > 0).sum() == 6
  assert (second > 0).sum() == 4
  held.release(0)
  # The last token is read even if its page is there: it gives the logits.
  assert held.take(0, text_T[:128], 150) == (64, 0)
  held.release(0)
  held.release(1)
  assert held.take(0, text_T, 330) == (0, 0)
