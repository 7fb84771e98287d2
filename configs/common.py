"""The fields that all configs share, and the change to sigmoid attention.

A config file offers the sweeps below if it imports them.
"""

from ml_collections import config_dict


def base():
  """Returns the fields that every task has; a task's config adds its own.

  Every field of a config is written here or in the task's config, so that
  `--config.a.b=value` can set it and a misspelt key is refused.
  """
  config = config_dict.ConfigDict()
  config.seed = 0  # of initialisation, data order, augmentation and dropout
  config.total_steps = 1000  # optimizer updates
  config.batch_size = 128  # examples per update, over all devices
  # A folder of transformers or timm, or of a run of ours, with the parameters
  # to start from; None means random ones. See sigattn/pretrained.
  config.init_from = config_dict.placeholder(str)
  config.dtype = "float32"  # of activations; parameters are always float32

  config.attn = config_dict.create(
    kind="softmax",  # softmax, sigmoid, relu, relu2 or silu
    # Added to every logit. None means -log n for sigmoid and 0 for the others,
    # where n is the longest sequence that the model is built for. It must be
    # None for softmax, which a constant does not change.
    logit_bias=config_dict.placeholder(float),
    learn_logit_bias=False,  # train one bias per head, starting at logit_bias
    # Divide the weights of a row by their sum, which recall needs.
    normalize=False,
    qk_norm="none",  # none, layernorm or rmsnorm, over the head width
    alibi=False,  # linear distance penalty, with the slopes of 2108.12409
    # How many tokens before it a token sees, besides itself. If the task is not
    # causal, it sees as many after it. None: all.
    window=config_dict.placeholder(int),
    num_kv_heads=config_dict.placeholder(int),  # None: as many as num_heads
    # Divides the output of each token by the number of tokens that it sees,
    # raised to this power. Only for causal tasks. 0 turns it off; 0.5 and 1 are
    # ablations.
    row_power=0.0,
    # Let each head forget: a trained gate of each token lowers the logits of
    # all keys before it (2503.02130). Only for causal tasks.
    forget_gate=False,
    # None chooses the fastest one that supports the problem.
    implementation=config_dict.placeholder(str),
  )

  # How many devices split each of these. The product is the number of devices.
  # One of data and fsdp may be None; it then takes the devices that remain.
  config.mesh = config_dict.create(
    data=config_dict.placeholder(int),  # the batch; each has all parameters
    fsdp=1,  # the batch, the parameters and the optimizer's state
    tensor=1,  # heads and MLP channels
    sequence=1,  # the tokens of a row; not with softmax
    exchange="ring",  # of keys along `sequence`: ring or all_gather
  )

  config.optim = config_dict.create(
    name="adamw",  # adamw, lion or sgd
    lr=1e-3,  # the peak of the schedule
    schedule="cosine",  # cosine, linear, rsqrt or constant, after the warm-up
    end_lr=0.0,  # the end of cosine and linear, as a fraction of lr
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    mu_dtype="float32",  # of the first moment, or bfloat16 to save memory
    # Of the stored gradients of matrices, or bfloat16 if `dtype` is bfloat16.
    # The matrix products then give bfloat16 anyway. Sums of gradients are in
    # float32.
    grad_dtype="float32",
    weight_decay=0.0,  # multiplied by the learning rate, as in optax.adamw
    # Pairs of a regular expression for parameter paths and a factor on
    # weight_decay. The first match counts; without a match the factor is 0.
    decay_groups=((r".*kernel", 1.0),),
    # Likewise, with a factor on the learning rate. It does not change the
    # weight decay. Without a match the factor is 1.
    lr_groups=(),
    clip_norm=1.0,  # largest norm of the whole gradient; 0 turns clipping off
    # Micro-batches per update; k of them need 1/k of the activations' memory.
    accumulate=1,
    # What happens at a step whose loss or gradient is not finite: "raise" ends
    # the run, "skip" omits the update.
    non_finite="raise",
    max_skipped=10,  # the run ends after this many omitted updates in a row
    # Evaluate an exponential moving average of the parameters, for example with
    # 0.9999; 0 evaluates the parameters themselves.
    ema_decay=0.0,
  )
  # A reference to total_steps follows a later --config.total_steps=...
  config.optim.warmup_steps = config.get_ref("total_steps") // 20

  config.eval = config_dict.create()
  config.eval.every_steps = config.get_ref("total_steps") // 10

  config.ckpt = config_dict.create(
    keep=1,  # how many of the newest checkpoints to keep, besides the best
    best_metric="accuracy",
    best_mode="max",  # max or min
  )
  config.ckpt.every_steps = config.get_ref("total_steps") // 5

  config.log = config_dict.create(tensorboard=True)
  log_lines(config, 20)

  # sigattn/analysis/telemetry.py measures statistics of attention and the norms
  # of updates.
  config.telemetry = config_dict.create(
    every_steps=0,  # updates between two measurements; 0 turns them off
    # Held-out examples whose attention is measured. Each needs the memory of
    # several arrays of heads * length^2 floats.
    examples=8,
  )
  return config


def log_lines(config, count):
  """Sets log.every_steps, the updates per line of metrics, to 1/count of all.

  A line has the means over these updates. The number is rounded up.
  """
  config.log.every_steps = (config.get_ref("total_steps") + count - 1) // count


def sigmoid(config):
  """Sets sigmoid attention: sigmoid(q k^T / sqrt(d) - log n) v (2409.04431).

  Setting the kind is enough, because the default bias follows from it.
  """
  config.attn.kind = "sigmoid"
  return config


def words(file, arg, choices):
  """Splits a config's argument at its commas and returns the words.

  Raises ValueError, which names the config file, for a word not in `choices`.
  """
  chosen = [word for word in (arg or "").split(",") if word]
  if unknown := [word for word in chosen if word not in choices]:
    raise ValueError(
      f"configs/{file}:{arg}: unknown {unknown[0]!r}; choose from {choices}"
    )
  return chosen


def shrink(config):
  """Shrinks a config to two small steps, for tests and for a laptop."""
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
