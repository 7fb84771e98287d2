"""Generating text: the cache against the full forward pass, and sampling."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigattn.inference import engine, generate, pages, sampling
from sigattn.kernels.problem import FLOAT8
from sigattn.training import setup
from tests.tasks.small_lm import (
  ALIBI,
  GATE,
  SINES,
  V,
  compiled,
  logits,
  make,
  small,
  tokens,
)

# The layers of GPT-NeoX, with fewer heads of keys and values.
NEOX = {
  "model.use_bias": True, "model.mlp": "gelu", "model.parallel": True,
  "model.norm": "pre", "model.norm_kind": "layernorm", "model.tied": False,
  "model.rope_share": 0.5, "attn.num_kv_heads": 1,
  "attn.learn_logit_bias": True,
}  # fmt: skip


@pytest.mark.parametrize(
  ("kind", "values"),
  [
    ("sigmoid", {}),
    ("softmax", {}),
    ("sigmoid", ALIBI),
    ("softmax", ALIBI),
    ("sigmoid", SINES),
    ("sigmoid", {"attn.normalize": True}),
    ("sigmoid", ALIBI | {"attn.window": 5}),
    ("softmax", {"attn.window": 3}),
    ("silu", {}),
    ("sigmoid", NEOX),
    ("softmax", GATE | {"attn.num_kv_heads": 1, "attn.window": 7}),
    ("sigmoid", GATE | ALIBI | {"attn.normalize": True}),
    ("relu", GATE | SINES),
  ],
)
def test_decoding_equals_the_full_forward_pass(kind, values):
  config = small(depth=2, **{"attn.kind": kind, **values})
  model = make(config)
  length_B, count = np.array([11, 4], np.int32), 6
  token_BT, forced_BT = tokens(2, 11), tokens(2, count, seed=3)

  def run(model, token_BT, forced_BT):
    model.prepare_to_generate()
    cache = model.empty_cache(2, 20)
    # The longer prompt is read in three parts. The second and the third part
    # of the shorter prompt are padding.
    logits_BTV = []
    for first in (0, 4, 8):
      part_BT = token_BT[:, first : first + 4]
      last_B = jnp.clip(length_B - 1 - first, 0, part_BT.shape[1] - 1)
      logits_BV, cache = model.extend(part_BT, cache, first, last_B)
      logits_BTV.append(logits_BV)
    first_BV = jnp.stack([logits_BTV[2][0], logits_BTV[0][1]])

    def decode(carry, token_B):
      cache, length_B = carry
      logits_BV, cache = model.decode(token_B, cache, length_B)
      return (cache, length_B + 1), logits_BV

    start = cache, jnp.asarray(length_B)
    _, after_TBV = jax.lax.scan(decode, start, forced_BT.T)
    return jnp.concatenate([first_BV[:, None], after_TBV.swapaxes(0, 1)], 1)

  logits_BTV = compiled(run, model, token_BT, forced_BT)
  for i, length in enumerate(length_B):
    whole = np.concatenate([token_BT[i, :length], forced_BT[i]])
    full = logits(model, whole[None])[0, length - 1 :]
    np.testing.assert_allclose(logits_BTV[i], full, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("is_paged", "dtype"), [(False, FLOAT8), (True, None)])
def test_a_token_copies_no_cache_and_reads_no_matrix_in_float32(
  is_paged, dtype
):
  config = small(depth=2, **ALIBI)
  config.dtype = "bfloat16"
  graphdef, shapes = engine.shapes(config)
  matrices = [x for x in jax.tree.leaves(shapes) if x.ndim > 1]
  assert {str(x.dtype) for x in matrices} == {"bfloat16"}
  machine = engine.Engine(graphdef, shapes, V, end=-1)

  def empty(params):
    machine = engine.Engine(graphdef, params, V, -1)
    if is_paged:
      return machine.empty_pages(pages.Pages(31, rows=3, most=10), dtype)
    return machine.empty(3, 640, dtype)

  state = jax.eval_shape(empty, shapes)
  heads, width = config.model.num_heads, config.model.width
  slots = "31,64" if is_paged else "3,640"
  name = "f8e4m3fn" if dtype else "bf16"
  shape = f"{name}[{slots},{heads},{width // heads}]"
  lowered = machine.lower_decode(state, 4, sampling.Sampling(temperature=0))
  lines = lowered.compile().as_text().splitlines()
  made = [x.split(" = ")[1] for x in lines if f" = {shape}" in x]
  assert made
  assert not [x for x in made if "} copy(" in x]


class Given(types.SimpleNamespace):
  """Values of flags, as absl has them."""

  def __getitem__(self, name):
    return types.SimpleNamespace(value=getattr(self, name))


def test_generator_continues_a_batch_as_each_alone_and_streams_the_same(
  monkeypatch, capsys
):
  config = small(**ALIBI)  # By chance, it does not end its text.
  _, params = setup.init(config)
  generator = generate.Generator(config, params)
  prompts = ["And God said, ", "Let"]
  texts = generator(prompts, max_tokens=32, temperature=0)
  assert len(texts[0]) == 32
  options = {"max_tokens": 32, "temperature": 0, "prompt": prompts}
  files = {"workdir": "", "step": None, "prompts": None, "out": None}
  monkeypatch.setattr(generate.Generator, "load", lambda *_: generator)
  generate.run(Given(**vars(generate.Options()) | options | files))
  assert capsys.readouterr().out == (
    f"--- prompt 1 of 2 ---\n{prompts[0]}{texts[0]}\n\n"
    f"--- prompt 2 of 2 ---\n{prompts[1]}{texts[1]}\n\n"
  )
  # A warning comes before the text, not inside of it.
  monkeypatch.setattr(
    generate.logging, "warning", lambda line, *args: print(line % args)
  )
  options |= {"max_tokens": config.data.length, "prompt": prompts[:1]}
  generate.run(Given(**vars(generate.Options()) | options | files))
  warning, text, *_ = capsys.readouterr().out.splitlines()
  assert warning.startswith("texts may grow to ")
  assert text.startswith(prompts[0].rstrip())
  alone = [generator([x], max_tokens=32, temperature=0)[0] for x in prompts]
  assert texts == alone
  pieces = list(generator.stream(prompts[0], max_tokens=32, temperature=0))
  assert len(pieces) == 2
  assert "".join(pieces) == texts[0]
  drawn = [generator(prompts, max_tokens=32, seed=s)[0] for s in (0, 0, 1)]
  assert drawn[0] == drawn[1] != drawn[2]
  with pytest.raises(ValueError, match=r"temperature=-1"):
    generator(prompts, temperature=-1)
  with pytest.raises(ValueError, match=r"max_tokens=0; must be .* >= 1"):
    generator(prompts, max_tokens=0)
  for wrong in ({"temperature": "x"}, {"max_tokens": 1.5}, {"top_p": None}):
    [[name, value]] = wrong.items()
    said = "; must be a (whole )?number"
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}") + said):
      generator(prompts, **wrong)
  with pytest.raises(
    ValueError, match="prompts='a'; must be a list of prompts"
  ):
    generator("a")
  with pytest.raises(ValueError, match="prompts: 3; must be a string"):
    generator([3])
  with pytest.raises(ValueError, match="characters"):
    generator(["Ω"])


def test_a_row_that_has_ended_stays_so():
  class Counter:
    """A model whose next token is the number of tokens."""

    def decode(self, token_B, cache, length_B, table_BM):
      del token_B, table_BM
      return jax.nn.one_hot(length_B + 1, V), cache

  state = engine.State(
    length_B=jnp.array([3, 1, 8]),
    left_B=jnp.array([20, 20, 2]),
    drawn_B=jnp.zeros(3, jnp.int32),
    key_B=jax.random.split(jax.random.key(0), 3),
    logits_BV=jax.nn.one_hot(jnp.array([3, 1, 8]), V),
    cache=(),
  )
  greedy = sampling.Sampling(temperature=0)
  token_BT, last = engine.decode(Counter(), state, 9, greedy, V, end=5)
  np.testing.assert_array_equal(
    token_BT,
    [
      [3, 4, 5, 5, 5, 5, 5, 5, 5],
      [1, 2, 3, 4, 5, 5, 5, 5, 5],
      [8, 9, 5, 5, 5, 5, 5, 5, 5],
    ],
  )
  assert not last.left_B.any()
  np.testing.assert_array_equal(last.length_B, [6, 6, 10])
  np.testing.assert_array_equal(last.drawn_B, [3, 5, 2])


def test_top_k_and_top_p_keep_what_they_say():
  p = np.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]], np.float32)

  def kept(**options):
    kept_BV = sampling.keep(jnp.log(p), sampling.Sampling(**options))
    return np.isfinite(kept_BV).sum(1).tolist()

  assert kept(top_k=2) == [2, 2]
  assert kept(top_k=9) == [4, 4]
  assert kept(top_p=0.5) == [1, 1]
  assert kept(top_p=0.79) == [2, 2]
  assert kept(top_p=0.81) == [3, 3]
  assert kept(top_k=3, top_p=0.9) == [3, 3] != kept(top_k=3, top_p=0.8)
  kept_BV = sampling.keep(jnp.log(p), sampling.Sampling(top_k=2))
  assert np.isfinite(kept_BV).tolist()[0] == [True, True, False, False]


def test_draws_follow_the_probabilities():
  p = np.array([0.6, 0.3, 0.1], np.float32)
  logits_BV = jnp.tile(jnp.log(p), (4000, 1))
  for temperature in (1.0, 0.5):
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = sampling.sample(keys, logits_BV, sampling.Sampling(temperature))
    share = np.bincount(drawn, minlength=3) / 4000
    expected = p ** (1 / temperature)
    np.testing.assert_allclose(share, expected / expected.sum(), atol=0.03)
