# %% [markdown]
# # Training and sweeping from a notebook
#
# A config is the whole experiment, `train` a function of it, and a sweep a list
# of differences.

# %%
import sys

sys.path.append("..")  # the root of the repository, from here

import pathlib
import tempfile

import matplotlib.pyplot as plt

from configs import vit_sigmoid
from sigattn import tasks
from sigattn.training import metrics, setup
from train import train

# %% [markdown]
# ## One run
#
# The default of `configs/vit_sigmoid.py`, smaller and shorter: Fashion-MNIST in
# patches of 7 pixels.


# %%
def small(**changes):
  config = vit_sigmoid.get_config()
  config.total_steps = 120
  config.batch_size = 64
  config.model.update(width=32, depth=1, num_heads=2, mlp_dim=64)
  config.optim.lr = 1e-2
  config.log.every_steps = 20
  config.log.tensorboard = False
  config.eval.every_steps = 40
  config.ckpt.every_steps = 0
  config.update_from_flattened_dict(changes)
  return config


state = train(small())  # without a folder it writes nothing

# %% [markdown]
# The state holds the parameters; `setup.model` makes a callable model of them.

# %%
config = small()
model = setup.model(config, state.params)
batch = next(iter(tasks.eval_batches(config, "test")))
images = batch["image"][:8]
guesses = model(tasks.get("vit").normalize(config.data, images)).argmax(-1)
figure, row = plt.subplots(1, 8, figsize=(8, 1.4), layout="constrained")
for axes, image, guess, label in zip(
  row, images, guesses, batch["label"], strict=False
):
  axes.imshow(image[..., 0], cmap="gray_r")
  axes.set_title(f"{int(guess)} ({int(label)})", fontsize="small")
  axes.axis("off")
plt.show()

# %% [markdown]
# Guess, and in brackets the label. A bad value is refused before any work:

# %%
try:
  train(small(**{"attn.kind": "sigmiod"}))
except ValueError as error:
  print(error)

# %% [markdown]
# ## A sweep
#
# The generators beside `get_config` are those that `python -m sigattn.sweep`
# takes. In a folder, a run keeps its metrics as lines of JSON. The training
# loss is the higher one, since it is of images that are mixed up (mixup).

# %%
metrics.console.quiet = True  # no tables and progress of each run
root = pathlib.Path(tempfile.mkdtemp())
runs = {}
for delta in vit_sigmoid.sweep_attn():
  name = delta["attn.kind"]
  train(small(**delta), root / name)
  runs[name] = metrics.read(root / name)

# %%
figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
for index, (name, lines) in enumerate(runs.items()):
  for split, style in (("train", "-"), ("test", "o--")):
    chosen = [line for line in lines if line["split"] == split]
    axes.plot(
      [line["step"] for line in chosen],
      [line["loss"] for line in chosen],
      style,
      color=f"C{index}",
      label=name if split == "test" else None,
    )
axes.set(xlabel="step", ylabel="loss (circles: held out)")
axes.legend(frameon=False)
axes.grid(alpha=0.3)
plt.show()

# %%
for name, lines in runs.items():
  print(f"{name:8} {lines[-1]['accuracy']:.3f}")
