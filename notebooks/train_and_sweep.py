# %% [markdown]
# # Training and sweeping from a notebook
#
# A config describes a whole experiment, `train` is a function of a config, and
# a sweep is a list of changes to a config.

# %%
import sys

sys.path.append("..")  # the root of the repository

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
# This is a smaller and shorter version of the default run of
# `configs/vit_sigmoid.py`: Fashion-MNIST in patches of 7 x 7 pixels.


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


state = train(small())  # writes nothing, because no folder is given

# %% [markdown]
# The state contains the parameters. `setup.model` makes a callable model from
# them.

# %%
config = small()
model = setup.model(config, state.params)
batch = next(iter(tasks.eval_batches(config, "test")))
images = batch["image"][:8]
predictions = model(tasks.get("vit").normalize(config.data, images)).argmax(-1)
figure, row = plt.subplots(1, 8, figsize=(8, 1.4), layout="constrained")
for axes, image, prediction, target in zip(
  row, images, predictions, batch["target"], strict=False
):
  axes.imshow(image[..., 0], cmap="gray_r")
  axes.set_title(f"{int(prediction)} ({int(target)})", fontsize="small")
  axes.axis("off")
plt.show()

# %% [markdown]
# The number above each image is the predicted class, and the number in brackets
# is the true one.
#
# A wrong value in a config raises an error before any work starts:

# %%
try:
  train(small(**{"attn.kind": "sigmiod"}))
except ValueError as error:
  print(error)

# %% [markdown]
# ## A sweep
#
# A sweep is a generator in the config file, such as `sweep_attn`. It yields the
# changes for one run after the other. `python -m sigattn.sweep` trains the same
# runs. Here we call `train` ourselves, with a folder for each run. It writes
# its metrics there as lines of JSON.
#
# In the picture below, the training loss is higher than the held-out loss,
# because only the training images are mixed (mixup).

# %%
metrics.console.quiet = True  # hides each run's tables and progress
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
