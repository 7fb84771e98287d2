"""An acoustic encoder with CTC and softmax attention: speech_sigmoid's twin.

python train.py --config=configs/speech.py                 prompts, CPU
python train.py --config=configs/speech.py:gpu             prompts, one GPU
python train.py --config=configs/speech.py:librispeech     the paper's encoder
python train.py --config=configs/speech.py:runlocal        two tiny steps
"""

from ml_collections import config_dict

from configs import common
from configs.common import sweep_attn, sweep_lr, sweep_seed  # noqa: F401

# Hours of LibriSpeech (Panayotov et al., 2015) and their splits on the Hub.
HOURS = {
  "100h": "train.clean.100",
  "960h": "train.clean.100+train.clean.360+train.other.500",
}


def get_config(arg=None):
  """arg: words joined by commas: gpu, librispeech, one of HOURS, runlocal."""
  choices = ("gpu", "librispeech", "runlocal", *HOURS)
  words = common.words("speech.py", arg, choices)
  hours = [word for word in words if word in HOURS]
  large = hours or "librispeech" in words
  if len(hours) > 1 or (large and "gpu" in words):
    raise ValueError(f"configs/speech.py:{arg}: more than one recipe: {words}")
  config = _librispeech(*hours or ["960h"]) if large else _prompts()
  if "gpu" in words:
    _gpu(config)
  if "runlocal" in words:
    common.shrink(config)
    config.batch_size = 1
  return config.lock()


def _base():
  config = common.base()
  config.task = "speech"
  config.data = dict(
    # An embedded set (spoken_prompts), a local folder of parquet files, or a
    # Hugging Face name: owner/name or owner/name:subset.
    source="spoken_prompts",
    train_split="train",  # several: a+b
    eval_split="test",
    sample_rate=8000,  # Hz; recordings at another one are resampled
    # Transcripts are learned in these characters, without all others.
    alphabet=" 'abcdefghijklmnopqrstuvwxyz",
    # A batch is of utterances up to so long and longer than the edge before.
    # batch_size is that of the longest; a shorter bucket's is as many times
    # that as it fits in the longest.
    bucket_seconds=(1.25, 2.5, 5.0, 15.0),
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
    dropout=0.0,  # of the numbers that a branch adds
    drop_path=0.0,  # of the last layer's branches; linear in the depth
    remat=False,  # recompute activations in the backward pass
  )
  config.eval.beam_width = 1  # of the search for a text; 1: greedy
  config.ckpt.update(best_metric="cer", best_mode="min")
  return config


def _prompts():
  """The embedded default: 3:36 on two CPU cores, a CER of 0.28.

  Decided on single runs whose training loss and held-out CER were watched
  (benchmarks/NOTES.md): batches half as large, a second convolution and the
  hybrid norm each learn faster from the same audio.
  """
  config = _base()
  config.total_steps = 5000
  config.batch_size = 1
  config.model.update(convolutions=((7, 3), (5, 1)), norm="hybrid")
  config.attn.update(alibi=True, qk_norm="layernorm")
  config.optim.update(lr=2e-3, weight_decay=0.1, b2=0.98)
  return config


def _gpu(config):
  """The prompts on one H100: CER 0.18, in about five minutes."""
  config.total_steps = 4000
  config.batch_size = 16
  config.dtype = "bfloat16"
  # Each bucket is compiled twice, to train and to evaluate.
  config.data.bucket_seconds = (5.0, 15.0)
  config.augment.update(
    speeds=(0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2),
    freq_width=27,
    time_masks=4,
  )
  config.model.update(
    width=256,
    depth=8,
    mlp_dim=1024,
    positions="rope",
    dropout=0.2,
    drop_path=0.3,
  )
  config.optim.update(weight_decay=0.3, ema_decay=0.999)


def _librispeech(hours):
  """The paper's encoder of 255 million parameters, on 100 or 960 hours.

  Sizes, SpecAugment and the number of updates are what 2409.04431 takes, as far
  as we know: that paper's optimizer and batches are not in a form that we could
  check, and ours are AdamW, a cosine, and utterances up to 36 minutes an
  update. It has dropout, which is not here, and drops whole layers at 0.3: here
  examples skip branches, up to 0.3 of them in the last layer.
  ALiBi is what it found best; --config.attn.alibi=False
  --config.model.positions=cape or rope are its other choices.
  """
  config = _base()
  config.total_steps = 370_000
  config.batch_size = 64
  config.dtype = "bfloat16"
  config.attn.alibi = True
  config.data.update(
    source="openslr/librispeech_asr:all",
    train_split=HOURS[hours],
    eval_split="validation.clean",
    sample_rate=16000,
    bucket_seconds=(6.0, 12.0, 18.0, 36.0),
    num_workers=16,
  )
  config.augment.update(
    speeds=(1.0,),
    freq_masks=2,
    freq_width=30,
    time_masks=10,
    time_width=50,
    time_share=0.1,
  )
  config.model.update(
    width=768,
    depth=36,
    num_heads=4,
    mlp_dim=3072,
    drop_path=0.3,
    remat=True,
  )
  config.optim.update(lr=5e-4, warmup_steps=5000, weight_decay=0.01)
  config.eval.every_steps = 5000
  config.ckpt.every_steps = 5000
  config.log.every_steps = 100
  return config
