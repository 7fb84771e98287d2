"""A language model with softmax attention, the twin of lm_sigmoid.py.

  python train.py --config=configs/lm.py             King James text, CPU
  python train.py --config=configs/lm.py:gpu         the same, one GPU
  python train.py --config=configs/lm.py:85m --config.data.tokenizer=bpe.json
  python train.py --config=configs/lm.py:runlocal    two tiny steps

:85m, :1b and :7b are the models published with 2409.04431, on a mixture of
texts like the one they were trained on. `python -m sigattn.sweep` knows the
sweeps attn, lr and seed.
"""

from ml_collections import config_dict

from configs import common
from configs.common import sweep_attn, sweep_seed  # noqa: F401

# The published models (AXLearn's gala): {name: (width, depth, heads, MLP width,
# sequences per update, updates)}.
SIZES = {
  "85m": (768, 12, 12, 2048, 256, 400_000),
  "1b": (2048, 24, 32, 5632, 256, 300_000),
  "7b": (4096, 32, 32, 11008, 1024, 250_000),
}


def get_config(arg=None):
  """arg: comma-separated words: gpu or a name of SIZES, and runlocal."""
  words = common.words("lm.py", arg, ("runlocal", "gpu", *SIZES))
  recipes = [word for word in words if word != "runlocal"]
  if len(recipes) > 1:
    raise ValueError(f"configs/lm.py:{arg}: choose only one of {recipes}")
  config = _base()
  if recipes == ["gpu"]:
    _gpu(config)
  elif recipes:
    _published(config, recipes[0])
  if "runlocal" in words:
    common.shrink(config)
    config.data.update(length=32, shuffle_window=4, packing_window=4)
  return config.lock()


def _base():
  """The embedded text: 1.76 bits per character, in 2:36 min on two cores."""
  config = common.base()
  config.task = "lm"
  config.total_steps = 1500
  config.batch_size = 8  # rows per update
  config.data = dict(
    # An embedded text (kjv), a local file or folder (.txt, JSON lines, parquet,
    # tokens), or a Hugging Face name: owner/name or owner/name:subset.
    source="kjv",
    # Pairs of (source, share of the rows) to train on; `source` is then "".
    mixture=(),
    # The source to evaluate on. None means config.data.source.
    eval_source=config_dict.placeholder(str),
    # train_without_validation omits the end of one text, which is then the
    # split `validation`.
    train_split="train",
    # `test` is the last 5 % of an embedded text or of a .txt. A local file or
    # folder without such a split gives about every 20th document to it.
    eval_split="test",
    text_column="text",
    lines=False,  # whether each line of a .txt is a document of its own
    # characters (each character of the texts is a token), bytes, or the path of
    # a tokenizer.json.
    tokenizer="characters",
    # At least the size of the tokenizer. None means that size, rounded up to a
    # multiple of 64.
    vocab_size=config_dict.placeholder(int),
    length=256,  # tokens per row that are predicted
    # Documents of a stream that are shuffled together. There are fewer at the
    # end of an epoch, and if they have more than 67 million characters. The
    # rows of about 8 million characters of these are then shuffled again.
    shuffle_window=10_000,
    # The share of a stream's documents that may be no text. Each is skipped,
    # with its number in the log; 0 ends the run at the first. It is a share of
    # the documents read so far, but of at least shuffle_window documents before
    # the first epoch ends; one document may always be corrupt.
    max_corrupt_share=0.0,
    packing_window=128,  # rows that a stream's documents fill at the same time
    num_workers=0,  # processes that cut an embedded text; must be 0 for streams
  )
  config.model = dict(
    width=128,
    depth=4,
    num_heads=4,
    mlp_dim=344,  # 8/3 of the width, as in the published models
    # sincos (added), rope or none; ALiBi is attn.alibi. With ALiBi alone,
    # plain sigmoid has a larger loss than softmax; RoPE narrows the gap. With
    # RoPE alone, sigmoid fails on texts longer than its training rows, unless
    # b is -14 and rows are normalised (docs/science.md).
    positions="rope",
    rope_base=10_000.0,  # of RoPE's wavelengths
    rope_share=1.0,  # of a head's features that RoPE turns
    use_bias=False,  # in the linear layers of the blocks
    # Whether attention and MLP both read the block's input (GPT-J, GPT-NeoX).
    parallel=False,
    tied=True,  # whether the logits are products with the embedding
    # c of c tanh(logits / c); None means no cap.
    logit_cap=config_dict.placeholder(float),
    mlp="swiglu",  # gelu, gelu_exact or swiglu
    norm="hybrid",  # pre, post, or hybrid: x + norm(f(norm(x)))
    norm_kind="rmsnorm",  # layernorm or rmsnorm
    # Added to the variance in a norm. None: 1e-6, or 1e-5 for rmsnorm.
    norm_epsilon=config_dict.placeholder(float),
    # Initial value of the factor on each branch, 1e-4 in the paper's code. None
    # means no factor.
    layer_scale=config_dict.placeholder(float),
    dropout=0.0,  # probability, for each number that a branch adds
    # Probability of skipping a branch of the last layer; it grows linearly with
    # the depth from 0 in the first layer.
    drop_path=0.0,
    # What the backward pass computes again to save memory: none; all of a
    # layer; dots, all but products of matrices and attention; or all but named
    # activations, such as attention+gate+up.
    remat="none",
    max_unrolled=6,  # deeper stacks run in a loop, which compiles sooner
    # The logits of a row are computed in this many parts, one after another.
    # Memory holds the float32 logits of one part only.
    loss_chunks=1,
  )
  # The n of sigmoid's bias -log n is the length of the training rows. It does
  # not depend on the length of texts that are evaluated or generated.
  config.model.max_length = config.data.get_ref("length") * 1
  config.attn.update(alibi=True, qk_norm="rmsnorm")
  config.optim.update(lr=5e-3, b2=0.98, weight_decay=0.1)
  config.optim.decay_groups = ((r".*kernel|embed|head", 1.0),)
  config.eval.every_steps = config.get_ref("total_steps") // 4
  # Rows of a stream to evaluate; None means all.
  config.eval.rows = config_dict.placeholder(int)
  # Whether to report the loss by position in the row, too. eval.py sets it.
  config.eval.by_position = False
  # eval.py also evaluates at these multiples of the training length.
  config.eval.length_factors = (1, 2, 4, 8)
  # The n of sigmoid's bias in these evaluations: the length of training, of the
  # test, or one after the other.
  config.eval.max_length_of = ("training",)
  config.ckpt.update(best_metric="loss", best_mode="min")
  common.log_lines(config, 15)
  return config


def _gpu(config):
  """The embedded text: 1.48 bits per character, in 91 seconds on one H100."""
  config.total_steps = 1000
  config.batch_size = 64
  config.dtype = "bfloat16"
  config.data.length = 512
  config.model.update(
    width=384, depth=8, num_heads=6, mlp_dim=1024, drop_path=0.3
  )
  config.optim.update(lr=2e-3, weight_decay=0.3)
  common.log_lines(config, 10)


def _published(config, size):
  """The models of 2409.04431, with the sizes and optimizer of AXLearn's gala.

  They were trained on text of RedPajama and SlimPajama, in the shares below,
  with a SentencePiece vocabulary of 32,768 tokens. This config uses a
  byte-level BPE of that size, which `python -m sigattn train_tokenizer` trains.
  They were evaluated on the first 5,000 texts of OpenWebText2; this config
  takes the first 5,000 rows of C4's validation split.
  """
  width, depth, num_heads, mlp_dim, batch_size, steps = SIZES[size]
  config.total_steps = steps
  config.batch_size = batch_size
  config.dtype = "bfloat16"
  pajama = "togethercomputer/RedPajama-Data-1T"
  config.data.update(
    source="",
    mixture=(
      (f"{pajama}:common_crawl", 0.726),
      (f"{pajama}:c4", 0.081),
      (f"{pajama}:github", 0.049),
      (f"{pajama}:book", 0.021),
      (f"{pajama}:arxiv", 0.023),
      (f"{pajama}:wikipedia", 0.05),
      (f"{pajama}:stackexchange", 0.05),
    ),
    eval_source="allenai/c4:en",
    eval_split="validation",
    tokenizer="bpe.json",
    vocab_size=32768,
    length=4096,
  )
  config.eval.rows = 5000
  config.attn.alibi = True
  config.model.update(
    width=width,
    depth=depth,
    num_heads=num_heads,
    mlp_dim=mlp_dim,
    positions="none",
    # A step of :1b with eight rows then needs 64 GiB of GPU memory.
    remat="dots",
    # An unrolled :1b trains a tenth faster; it compiles in 23 seconds.
    max_unrolled=6 if size == "7b" else depth,
    loss_chunks=8,
  )
  if size == "7b":
    # Every device holds a part of the parameters. With 8 devices each computes
    # 2 rows at a time, which by calculation takes 48 of its 80 GB.
    config.mesh.update(data=1, fsdp=None)
    config.optim.accumulate = 64
  config.optim.update(lr=0.01, b2=0.95, end_lr=0.1)
  # The published recipe decays the norms' scales too. Its warm-up begins at a
  # learning rate of 0, at which an update changes nothing; ours begins at the
  # next rate.
  config.optim.decay_groups = ((r".*kernel|embed|head|.*scale", 1.0),)
  config.optim.warmup_steps = 5000
  # The published weight decay is independent of the learning rate: 1e-4 times a
  # schedule with peak 1. Ours is multiplied by lr, hence the division.
  config.optim.weight_decay = 1e-4 / config.optim.get_ref("lr")
  # As in muP, the learning rate of a matrix is proportional to 1 / width; the
  # narrowest model has width 768.
  config.optim.lr_groups = ((r".*kernel", 768 / width),)
  config.eval.every_steps = 5000
  config.ckpt.every_steps = 5000
  config.log.every_steps = 100


def sweep_lr():
  for lr in (1e-3, 2e-3, 4e-3, 8e-3):
    yield {"optim.lr": lr}
