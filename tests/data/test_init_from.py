"""A run begins from another run of ours, and the log says how."""

import pytest

from sigattn.training import setup
from tests.data.test_kept_tokenizer import make
from train import train


def test_another_size_is_refused_with_the_flags_to_add(texts, run):
  config = make(texts, init_from=str(run))
  depth = config.model.depth
  config.model.update(depth=depth + 1)
  config.attn.update(
    forget_gate=True, qk_norm="none", alibi=not config.attn.alibi
  )
  with pytest.raises(ValueError, match="which needs: --config") as caught:
    setup.validate_config(config)
  said = str(caught.value)
  assert said.endswith(
    "to compute what the run does, add: --config.attn.alibi="
    f"{not config.attn.alibi}"
  )
  for flag in (
    f"--config.model.depth={depth}",
    "--config.attn.forget_gate=False",
    "--config.attn.qk_norm=rmsnorm",
  ):
    assert flag in str(caught.value)
  # The gate alone would be refused too, and so would the depth alone.
  config.attn.update(
    forget_gate=False, qk_norm="rmsnorm", alibi=not config.attn.alibi
  )
  said = rf"config\.model\.depth={depth + 1}; must be {depth} as in the run of"
  with pytest.raises(ValueError, match=said):
    setup.validate_config(config)
  # The heads of keys follow the heads unless they are given.
  heads = config.model.num_heads
  config.model.update(depth=depth, num_heads=2 * heads)
  said = f"which needs: --config.model.num_heads={heads}$"
  with pytest.raises(ValueError, match=said):
    setup.validate_config(config)
  config.model.num_heads = heads
  setup.validate_config(config)


def test_the_log_says_what_was_taken_and_how_attention_differs(
  texts, run, tmp_path, capsys, caplog
):
  config = make(texts, init_from=str(run))
  config.attn.kind = "sigmoid"
  config.model.update(rope_base=500.0, logit_cap=30.0, norm_epsilon=1e-3)
  train(config, tmp_path / "new")
  said = capsys.readouterr().out
  [line] = [x for x in said.splitlines() if x.startswith("started from")]
  taken, total = line.split("step 2, ")[1].split(" arrays")[0].split(" of ")
  assert taken == total
  assert line.endswith("arrays; none keeps its initial value")
  said = caplog.text
  assert "WARNING" in said
  assert "config.attn.kind='sigmoid' in place of 'softmax'" in said
  assert "config.model.rope_base=500.0 in place of 10000.0" in said
  assert "config.model.logit_cap=30.0 in place of None" in said
  assert "config.model.norm_epsilon=0.001 in place of " in said
