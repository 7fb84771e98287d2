"""An acoustic encoder with CTC and softmax attention: speech_sigmoid's twin.

python train.py --config=configs/speech.py                      prompts, CPU
python train.py --config=configs/speech.py:runlocal             two tiny steps
"""

from ml_collections import config_dict

from configs import common


def get_config(arg=None):
  """arg: words joined by commas: runlocal."""
  words = [word for word in (arg or "").split(",") if word]
  choices = ("runlocal",)
  if unknown := [word for word in words if word not in choices]:
    raise ValueError(
      f"configs/speech.py:{arg}: unknown {unknown[0]!r}; choose from {choices}"
    )
  config = _prompts()
  if "runlocal" in words:
    _shrink(config)
  return config.lock()


def _base():
  config = common.base()
  config.task = "speech"
  config.data = dict(
    # An embedded set (spoken_prompts), a Hugging Face name (owner/name), or a
    # local folder of parquet files.
    source="spoken_prompts",
    subset=config_dict.placeholder(str),  # of a Hugging Face data set
    train_split="train",  # several: a+b
    eval_split="test",
    sample_rate=8000,  # Hz; recordings at another one are resampled
    # Transcripts are learned in these characters, without all others.
    alphabet=" 'abcdefghijklmnopqrstuvwxyz",
    # A batch is of utterances up to so long and longer than the edge before.
    # batch_size is that of the longest; a shorter bucket's is as many times
    # that as it fits in the longest.
    bucket_seconds=(2.0, 4.0, 8.0, 16.0),
    num_workers=0,  # processes that decode and resample; 0: threads
  )
  config.augment = dict(
    speeds=(0.9, 1.0, 1.1),  # one of them an utterance (pitch goes with it)
    # SpecAugment: bands of up to freq_width bins, and of up to time_width
    # frames of 10 ms or time_share of the utterance.
    freq_masks=2,
    freq_width=20,
    time_masks=2,
    time_width=30,
    time_share=0.2,
  )
  config.model = dict(
    width=144,
    depth=4,
    num_heads=4,
    mlp_dim=576,
    mel_bins=80,
    convolutions=((7, 3),),  # (kernel, stride) in frames, then in tokens
    positions="none",  # sincos, cape, rope or none; attn.alibi besides
    # CAPE's augmentation, in tokens and as a factor.
    cape_shift=100.0,
    cape_local_shift=0.5,
    cape_scale=1.1,
    mlp="gelu",  # gelu or swiglu
    norm="pre",  # pre, post, or hybrid: x + norm(f(norm(x)))
    norm_kind="layernorm",  # layernorm or rmsnorm
    # Initial factor on each branch; None: no factor.
    layer_scale=config_dict.placeholder(float),
    drop_path=0.0,  # of the last layer's branches; linear in the depth
    remat=False,  # recompute activations in the backward pass
  )
  config.eval.beam_width = 1  # of the search for a text; 1: greedy
  config.ckpt.update(best_metric="cer", best_mode="min")
  return config


def _prompts():
  """The embedded default."""
  config = _base()
  config.total_steps = 2500
  config.batch_size = 2
  config.attn.update(alibi=True, qk_norm="layernorm")
  config.optim.update(lr=2e-3, weight_decay=0.1, b2=0.98)
  return config


def _shrink(config):
  """Two small steps of the same program, for tests and for a laptop."""
  config.total_steps = 2
  config.batch_size = 1
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
