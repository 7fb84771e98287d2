"""What every config shares, and the paper's difference as one function.

The sweeps below are of every config that imports them.
"""

from ml_collections import config_dict


def base():
  """The blocks that every task has; a task's config fills them in.

  Everything that can be set is written here or in the task's config, so that
  `--config.a.b=value` reaches it and a misspelt key is refused.
  """
  config = config_dict.ConfigDict()
  config.seed = 0  # of initialisation, data order, augmentation and dropping
  config.total_steps = 1000  # optimizer updates
  config.batch_size = 128  # examples an update, over all devices
  config.dtype = "float32"  # of the computation; parameters stay float32

  config.attn = config_dict.create(
    kind="softmax",  # softmax, sigmoid, relu or relu2
    # Added to every logit. None: -log n for sigmoid, 0 for ReLU, with n the
    # longest sequence that the model is built for. Senseless with softmax.
    logit_bias=config_dict.placeholder(float),
    learn_logit_bias=False,  # one trainable bias a head, starting from it
    qk_norm="none",  # none, layernorm or rmsnorm, over the head width
    alibi=False,  # linear distance penalty with the usual slope per head
    num_kv_heads=config_dict.placeholder(int),  # None: num_heads
    # Divides what a token gathers by the number of those it sees to this power;
    # causal tasks alone. 0 is off, 1 and 0.5 are ablations.
    row_power=0.0,
    implementation=config_dict.placeholder(str),  # None: the fastest that can
  )

  config.optim = config_dict.create(
    name="adamw",  # adamw, lion or sgd
    lr=1e-3,  # peak
    schedule="cosine",  # cosine, linear, rsqrt or constant, after the warm-up
    end_lr=0.0,  # where cosine and linear end, as a fraction of lr
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.0,  # times the learning rate, as in optax.adamw
    # (regular expression of the parameter's path, factor on weight_decay);
    # the first that matches counts, no match means 0.
    decay_groups=((r".*kernel", 1.0),),
    # The same for a factor on the learning rate, but not on the decay; no match
    # means 1.
    lr_groups=(),
    clip_norm=1.0,  # of the whole gradient; 0 turns it off
    accumulate=1,  # micro-batches an update: 1/k of the activations' memory
    ema_decay=0.0,  # 0.9999, say: evaluate an average of the parameters
  )
  # References follow a later --config.total_steps=...
  config.optim.warmup_steps = config.get_ref("total_steps") // 20

  config.eval = config_dict.create()
  config.eval.every_steps = config.get_ref("total_steps") // 10

  config.ckpt = config_dict.create(
    keep=1,  # newest checkpoints kept, besides the best
    best_metric="accuracy",
    best_mode="max",  # max or min
  )
  config.ckpt.every_steps = config.get_ref("total_steps") // 5

  config.log = config_dict.create(
    every_steps=50,  # a line of metrics: means since the line before
    tensorboard=True,
  )

  # Norms and statistics of attention and of the update: sigattn/telemetry.py.
  config.telemetry = config_dict.create(
    every_steps=0,  # updates between two lines; 0: none
    # Held-out examples whose attention is measured: several times
    # heads * length^2 floats each.
    examples=8,
  )
  return config


def sigmoid(config):
  """The paper's difference: sigmoid(q k^T / sqrt(d) - log n) v (2409.04431).

  One word, because the bias's default follows from the kind.
  """
  config.attn.kind = "sigmoid"
  return config


def words(file, arg, choices):
  """The words of a config's argument, which are joined by commas.

  Raises ValueError, which names the config file, for one not in choices.
  """
  chosen = [word for word in (arg or "").split(",") if word]
  if unknown := [word for word in chosen if word not in choices]:
    raise ValueError(
      f"configs/{file}:{arg}: unknown {unknown[0]!r}; choose from {choices}"
    )
  return chosen


def shrink(config):
  """Two small steps of the same program, for tests and for a laptop."""
  config.total_steps = 2
  config.batch_size = 8
  config.model.update(width=16, depth=2, num_heads=2, mlp_dim=32)
  config.optim.warmup_steps = 1
  config.eval.every_steps = 2
  config.ckpt.every_steps = 1
  config.log.every_steps = 1
  config.data.num_workers = 0


def sweep_attn():
  for kind in ("sigmoid", "softmax"):
    yield {"attn.kind": kind}


def sweep_lr():
  for lr in (5e-4, 1e-3, 2e-3, 4e-3):
    yield {"optim.lr": lr}


def sweep_seed():
  for seed in range(3):
    yield {"seed": seed}
