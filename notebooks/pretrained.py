# %% [markdown]
# # Continue a softmax model with sigmoid attention
#
# `config.init_from` names a folder with a model of transformers (Llama,
# GPT-NeoX, ViT) or of timm. A run starts from the parameters of this model, and
# may use another kind of attention. This notebook does not download a public
# model. It trains a small one with softmax, on the same text as the runs below,
# and saves it as a Llama.

# %%
import sys

sys.path.append("..")  # the root of the repository

import json
import pathlib
import tempfile
import warnings

import matplotlib.pyplot as plt

from configs import lm
from sigattn import pretrained
from sigattn.data import text
from sigattn.training import metrics
from train import train

metrics.console.quiet = True  # hides each run's tables and progress
warnings.filterwarnings("ignore", "IProgress")  # about a progress bar
root = pathlib.Path(tempfile.mkdtemp())

# A text file; its last 5 % are held out.
[content] = text.documents("kjv", "test", "text")
(root / "mine.txt").write_text(content[:120_000])


def small(**changes):
  """A config with the layers of Llama, for the text above."""
  config = lm.get_config("runlocal")
  config.total_steps = 60
  config.batch_size = 16
  config.data.update(source=str(root / "mine.txt"), length=64)
  config.model.update(
    width=32, depth=1, num_heads=4, mlp_dim=64, norm="pre", tied=False
  )
  config.attn.update(alibi=False, qk_norm="none", num_kv_heads=2)
  config.optim.update(lr=5e-3, warmup_steps=5)
  config.eval.every_steps = 10
  config.ckpt.every_steps = 0
  config.log.update(every_steps=10, tensorboard=False)
  config.update_from_flattened_dict(changes)
  return config


# %% [markdown]
# ## A model in another library's form
#
# In transformers, `save_pretrained` writes a folder with a config.json and a
# model.safetensors. `pretrained.save` writes the same files. For a run that was
# saved, `python -m sigattn export` does so.

# %%
config = small(**{"total_steps": 200, "eval.every_steps": 0})
state = train(config)
public = root / "public"
pretrained.save(config, state.params, public)
settings = json.loads((public / "config.json").read_text())
print(settings["architectures"], sorted(x.name for x in public.iterdir()))

# %% [markdown]
# ## Continued with another attention
#
# `pretrained.values` reads the sizes, the norms, the base of RoPE and the like
# from the folder. They are values for our config, to which only the tokenizer
# and the data must be added.
#
# Sigmoid has the bias -log n. The weights of a long row then add up to about 1,
# like those of softmax.

# %%
values = pretrained.values(public)
print(values)


runs = {
  f"{kind}, continued": small(
    **values, **{"attn.kind": kind, "init_from": str(public)}
  )
  for kind in ("softmax", "sigmoid")
}
runs["sigmoid, from random parameters"] = small(**{"attn.kind": "sigmoid"})
for name, run in runs.items():
  train(run, root / name)

# %% [markdown]
# The parameters were trained for the weights of softmax, and sigmoid gives
# other weights. So the loss before the first update is higher with sigmoid:
# 2.390 nats a character, against 2.315 with softmax. After 60 updates it is
# 2.271 with sigmoid and 2.248 with softmax. The run with sigmoid that started
# from random parameters then has a loss of 2.522.

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for name in runs:
  lines = (root / name / "metrics.jsonl").read_text().splitlines()
  points = [json.loads(line) for line in lines]
  points = [x for x in points if x["split"] == "test"]
  axes.plot(
    [x["step"] for x in points], [x["loss"] for x in points], "o-", label=name
  )
  first, last = points[0], points[-1]
  print(f"{name}: {first['loss']:.3f} at step {first['step']}, ", end="")
  print(f"{last['loss']:.3f} at step {last['step']}")
axes.set(xlabel="step", ylabel="held-out loss, nats a character")
axes.legend(fontsize="small")
plt.show()
