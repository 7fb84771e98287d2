"""Maps models of transformers and timm to our settings and parameters.

A Family knows the settings and the tensors of one kind of model. In PyTorch the
weight of a linear layer is (out, in), and the heads of attention share one axis
with their features. Here a kernel is (in, out), and (in, N, H) for heads.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sigattn.validate import Field, flag, real, text, whole


class Entry(NamedTuple):
  """A tensor of theirs, and the parameters of ours that it holds.

  theirs: its name, with {} for the number of a layer.
  ours: paths of our parameters; those of a layer are relative to stack/blocks
    or encoder/blocks.
  load: their tensor -> a tuple with each of ours. save: the inverse.
  """

  theirs: str
  ours: tuple[str, ...]
  load: Callable[[np.ndarray], tuple[np.ndarray, ...]]
  save: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Family:
  """A kind of model.

  task: the name of our task.
  values: (their config, shapes of their tensors by name) -> the values of our
    config, by path. Raises ValueError for a setting that our models lack.
  entries: our values -> the entries.
  describe: our values and config.model.max_length -> their config; None if
    nothing is saved in this form.
  """

  task: str
  values: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
  entries: Callable[[Mapping[str, Any]], Sequence[Entry]]
  describe: Callable[[Mapping[str, Any], int], dict[str, Any]] | None = None


# Tensors.


def _vector(theirs, ours, shape=(-1,), theirs_shape=(-1,)):
  return Entry(
    theirs,
    (ours,),
    lambda w: (w.reshape(shape),),
    lambda w: w.reshape(theirs_shape),
  )


def _linear(theirs, ours, bias):
  matrix = Entry(
    f"{theirs}.weight", (f"{ours}/kernel",), lambda w: (w.T,), lambda w: w.T
  )
  return [matrix, *[_vector(f"{theirs}.bias", f"{ours}/bias")] * bias]


def _to_heads(theirs, ours, heads, bias):
  """A linear layer whose outputs are the features of each head."""
  matrix = Entry(
    f"{theirs}.weight",
    (f"{ours}/kernel",),
    lambda w: (w.T.reshape(w.shape[1], heads, -1),),
    lambda w: w.reshape(w.shape[0], -1).T,
  )
  vector = _vector(f"{theirs}.bias", f"{ours}/bias", (heads, -1))
  return [matrix, *[vector] * bias]


def _from_heads(theirs, ours, heads, bias):
  matrix = Entry(
    f"{theirs}.weight",
    (f"{ours}/kernel",),
    lambda w: (w.T.reshape(heads, -1, w.shape[0]),),
    lambda w: w.reshape(-1, w.shape[-1]).T,
  )
  return [matrix, *[_vector(f"{theirs}.bias", f"{ours}/bias")] * bias]


def _fused(theirs, heads, axis):
  """Query, key and value in one tensor, (3, N, H, in) or (N, 3, H, in).

  axis: the axis of size 3.
  """
  shape = [heads, -1]
  shape.insert(axis, 3)
  names = [f"attn/{name}" for name in ("query", "key", "value")]

  def matrices(w):
    parts = np.moveaxis(w.reshape(*shape, w.shape[1]), axis, 0)
    return tuple(np.moveaxis(part, -1, 0) for part in parts)

  def matrix(*parts):
    parts = [np.moveaxis(part, 0, -1) for part in parts]
    return np.stack(parts, axis).reshape(-1, parts[0].shape[-1])

  return [
    Entry(
      f"{theirs}.weight",
      tuple(f"{name}/kernel" for name in names),
      matrices,
      matrix,
    ),
    Entry(
      f"{theirs}.bias",
      tuple(f"{name}/bias" for name in names),
      lambda w: tuple(np.moveaxis(w.reshape(shape), axis, 0)),
      lambda *parts: np.stack(parts, axis).reshape(-1),
    ),
  ]


def _norm(theirs, ours, bias):
  scale = _vector(f"{theirs}.weight", f"{ours}/scale")
  return [scale, *[_vector(f"{theirs}.bias", f"{ours}/bias")] * bias]


def _table(theirs, ours):
  return Entry(theirs, (ours,), lambda w: (w,), lambda w: w)


def _patches(theirs, size, channels):
  """A convolution (D, C, size, size). Ours reads pixels in raster order."""
  matrix = Entry(
    f"{theirs}.weight",
    ("embed/kernel",),
    lambda w: (w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0]),),
    lambda w: w.reshape(size, size, channels, -1).transpose(3, 2, 0, 1),
  )
  return [matrix, _vector(f"{theirs}.bias", "embed/bias")]


# Settings.

_ACTIVATIONS = {  # {ours: theirs}
  "swiglu": ("silu",),
  "gelu_exact": ("gelu",),
  "gelu": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
}
# Settings that the models of all families have.
_PLAIN = {
  "model.norm": "pre",
  "model.layer_scale": None,
  "attn.qk_norm": "none",
  "attn.alibi": False,
  "attn.forget_gate": False,
}


_OBJECT = Field(
  lambda value: value is None or isinstance(value, Mapping), "must be an object"
)
_SIZE, _ABOVE_0 = whole(low=1), real(above=0)
_ABOVE_0_OR_NULL = real(above=0, optional=True)
# What the settings of their configs may be, by their keys.
_TYPES = {
  "architecture": text(),
  "hidden_act": text(),
  "hidden_size": _SIZE,
  "image_size": _SIZE,
  "intermediate_size": _SIZE,
  "head_dim": whole(low=1, optional=True),
  "layer_norm_eps": _ABOVE_0,
  "model_args": _OBJECT,
  "model_type": text(),
  "num_attention_heads": _SIZE,
  "num_channels": _SIZE,
  "num_heads": _SIZE,
  "num_hidden_layers": _SIZE,
  "num_key_value_heads": whole(low=1, optional=True),
  "partial_rotary_factor": _ABOVE_0_OR_NULL,
  "patch_size": _SIZE,
  "pretrained_cfg": _OBJECT,
  "quantization_config": Field(
    lambda value: value is None,
    "must be null: save the model without quantization",
  ),
  "rms_norm_eps": _ABOVE_0,
  "rope_parameters": _OBJECT,
  "rope_scaling": _OBJECT,
  "rope_theta": _ABOVE_0_OR_NULL,
  "rotary_emb_base": _ABOVE_0_OR_NULL,
  "rotary_pct": _ABOVE_0_OR_NULL,
  "tie_word_embeddings": flag(),
  "use_parallel_residual": flag(),
  "vocab_size": _SIZE,
}
_GROUPS = ("model_args", "rope_parameters", "rope_scaling")


def validate_types(config: Mapping[str, Any], path: str = "") -> None:
  """Raises ValueError for a setting of a config.json of another type.

  path: of the settings in the file, for the error.
  """
  for key, field in _TYPES.items():
    if key not in config:
      continue
    if not field.is_right(config[key]):
      raise ValueError(
        f"config.json: {path}{key}={config[key]!r:.100}; {field.wanted}"
      )
    if key in _GROUPS and config[key]:
      validate_types(config[key], f"{path}{key}.")


def _setting(config, key, right, default=None):
  """The value of a setting. Raises ValueError if our models do not have it."""
  value = config.get(key, default)
  if value not in right:
    raise ValueError(f"{key}={value!r}; must be one of {list(right)}")
  return value


def _mlp(config, right):
  theirs = [x for name in right for x in _ACTIVATIONS[name]]
  value = _setting(config, "hidden_act", theirs)
  return next(name for name in right if value in _ACTIVATIONS[name])


def _rope(config):
  """RoPE's dict of transformers 5; its version 4 has single fields."""
  rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
  kind = rope.get("rope_type") or rope.get("type") or "default"
  _setting({"rope_type": kind}, "rope_type", ("default",))
  return rope


def _rope_base(config):
  base = config.get("rope_theta") or config.get("rotary_emb_base") or 10_000
  return float(_rope(config).get("rope_theta") or base)


def _sizes(config):
  return {
    "model.width": config["hidden_size"],
    "model.depth": config["num_hidden_layers"],
    "model.num_heads": config["num_attention_heads"],
    "model.mlp_dim": config["intermediate_size"],
  }


def _is_tied(config, shapes, head):
  """Whether the embedding is also the head; raises if a head is missing."""
  if head in shapes:
    return False
  if not config.get("tie_word_embeddings", False):
    raise ValueError(
      f"there is no tensor {head!r}, and tie_word_embeddings is not set"
    )
  return True


def _language(config, **values):
  width, heads = config["hidden_size"], config["num_attention_heads"]
  if config.get("head_dim"):
    _setting(config, "head_dim", (width // heads,))
  return _PLAIN | _sizes(config) | {
    "attn.num_kv_heads": config.get("num_key_value_heads") or heads,
    "attn.row_power": 0.0,
    "data.vocab_size": config["vocab_size"],
    "model.positions": "rope",
    "model.rope_base": _rope_base(config),
    "model.logit_cap": None,
    **values,
  }  # fmt: skip


def _llama_values(config, shapes):
  for key in ("attention_bias", "mlp_bias"):
    _setting(config, key, (False,), False)
  return _language(
    config,
    **{
      "model.mlp": _mlp(config, ("swiglu",)),
      "model.norm_kind": "rmsnorm",
      "model.norm_epsilon": config["rms_norm_eps"],
      "model.use_bias": False,
      "model.parallel": False,
      "model.rope_share": 1.0,  # their Llama ignores partial_rotary_factor
      "model.tied": _is_tied(config, shapes, "lm_head.weight"),
    },
  )


def _llama_entries(values):
  heads, kv_heads = values["model.num_heads"], values["attn.num_kv_heads"]
  layer = "model.layers.{}."
  return [
    _table("model.embed_tokens.weight", "embed"),
    *([] if values["model.tied"] else [_table("lm_head.weight", "head")]),
    *_norm("model.norm", "norm", False),
    *_norm(f"{layer}input_layernorm", "attn_residual/norm_in", False),
    *_norm(
      f"{layer}post_attention_layernorm", "mlp_residual/norm_in", bias=False
    ),
    *_to_heads(f"{layer}self_attn.q_proj", "attn/query", heads, False),
    *_to_heads(f"{layer}self_attn.k_proj", "attn/key", kv_heads, False),
    *_to_heads(f"{layer}self_attn.v_proj", "attn/value", kv_heads, False),
    *_from_heads(f"{layer}self_attn.o_proj", "attn/out", heads, False),
    *_linear(f"{layer}mlp.gate_proj", "mlp/gate", False),
    *_linear(f"{layer}mlp.up_proj", "mlp/up", False),
    *_linear(f"{layer}mlp.down_proj", "mlp/down", False),
  ]


def _described(values, model_type, architecture):
  """The fields that the configs of transformers have in common."""
  return {
    "architectures": [architecture],
    "dtype": "float32",
    "hidden_act": _ACTIVATIONS[values["model.mlp"]][0],
    "hidden_size": values["model.width"],
    "intermediate_size": values["model.mlp_dim"],
    "model_type": model_type,
    "num_attention_heads": values["model.num_heads"],
    "num_hidden_layers": values["model.depth"],
  }


def _language_described(values, max_length):
  return {
    "bos_token_id": None,
    "eos_token_id": None,
    "max_position_embeddings": max_length,
    "rope_theta": values["model.rope_base"],
    "tie_word_embeddings": values["model.tied"],
    "vocab_size": values["data.vocab_size"],
  }


def _llama_described(values, max_length):
  return (
    _described(values, "llama", "LlamaForCausalLM")
    | _language_described(values, max_length)
    | {
      "num_key_value_heads": values["attn.num_kv_heads"],
      "rms_norm_eps": values["model.norm_epsilon"],
    }
  )


def _gpt_neox_values(config, shapes):
  _setting(config, "attention_bias", (True,), True)
  share = config.get("rotary_pct") or 0.25
  return _language(
    config,
    **{
      "model.mlp": _mlp(config, ("gelu_exact", "gelu")),
      "model.norm_kind": "layernorm",
      "model.norm_epsilon": config["layer_norm_eps"],
      "model.use_bias": True,
      "model.parallel": config.get("use_parallel_residual", True),
      "model.rope_share": float(
        _rope(config).get("partial_rotary_factor") or share
      ),
      "model.tied": _is_tied(config, shapes, "embed_out.weight"),
    },
  )


def _gpt_neox_entries(values):
  heads, layer = values["model.num_heads"], "gpt_neox.layers.{}."
  return [
    _table("gpt_neox.embed_in.weight", "embed"),
    *([] if values["model.tied"] else [_table("embed_out.weight", "head")]),
    *_norm("gpt_neox.final_layer_norm", "norm", True),
    *_norm(f"{layer}input_layernorm", "attn_residual/norm_in", True),
    *_norm(
      f"{layer}post_attention_layernorm", "mlp_residual/norm_in", bias=True
    ),
    *_fused(f"{layer}attention.query_key_value", heads, axis=1),
    *_from_heads(f"{layer}attention.dense", "attn/out", heads, True),
    *_linear(f"{layer}mlp.dense_h_to_4h", "mlp/up", True),
    *_linear(f"{layer}mlp.dense_4h_to_h", "mlp/down", True),
  ]


def _gpt_neox_described(values, max_length):
  return (
    _described(values, "gpt_neox", "GPTNeoXForCausalLM")
    | _language_described(values, max_length)
    | {
      "layer_norm_eps": values["model.norm_epsilon"],
      "rotary_emb_base": values["model.rope_base"],
      "rotary_pct": values["model.rope_share"],
      "use_parallel_residual": values["model.parallel"],
    }
  )


def _vision(**values):
  return _PLAIN | {
    "attn.num_kv_heads": values["model.num_heads"],
    "model.norm_kind": "layernorm",
    "model.positions": "learned",
    **values,
  }


def _vit_values(config, shapes):
  _setting(config, "qkv_bias", (True,), True)
  head = shapes.get("classifier.weight")
  return _vision(**_sizes(config), **{
    "model.mlp": _mlp(config, ("gelu_exact", "gelu")),
    "model.norm_epsilon": config["layer_norm_eps"],
    "model.patch_size": config["patch_size"],
    "model.pool": "class",
    "data.image_size": config["image_size"],
    "data.channels": config["num_channels"],
    "data.num_classes": head[0] if head else None,
  })  # fmt: skip


def _vit_entries(values):
  heads, layer = values["model.num_heads"], "vit.encoder.layer.{}."
  attention = f"{layer}attention.attention."
  embeddings, width = "vit.embeddings.", values["model.width"]
  tokens = (values["data.image_size"] // values["model.patch_size"]) ** 2 + 1
  return [
    _vector(f"{embeddings}cls_token", "class_token", (-1,), (1, 1, -1)),
    _vector(
      f"{embeddings}position_embeddings", "position", (tokens, width),
      (1, tokens, width),
    ),
    *_patches(
      f"{embeddings}patch_embeddings.projection", values["model.patch_size"],
      values["data.channels"],
    ),
    *_norm(f"{layer}layernorm_before", "attn_residual/norm_in", True),
    *_norm(f"{layer}layernorm_after", "mlp_residual/norm_in", True),
    *_to_heads(f"{attention}query", "attn/query", heads, True),
    *_to_heads(f"{attention}key", "attn/key", heads, True),
    *_to_heads(f"{attention}value", "attn/value", heads, True),
    *_from_heads(f"{layer}attention.output.dense", "attn/out", heads, True),
    *_linear(f"{layer}intermediate.dense", "mlp/up", True),
    *_linear(f"{layer}output.dense", "mlp/down", True),
    *_norm("vit.layernorm", "norm", True),
    *_linear("classifier", "head", True),
  ]  # fmt: skip


def _vit_described(values, max_length):
  del max_length
  names = {str(i): f"LABEL_{i}" for i in range(values["data.num_classes"])}
  return _described(values, "vit", "ViTForImageClassification") | {
    "id2label": names,
    "image_size": values["data.image_size"],
    "label2id": {name: int(i) for i, name in names.items()},
    "layer_norm_eps": values["model.norm_epsilon"],
    "num_channels": values["data.channels"],
    "patch_size": values["model.patch_size"],
    "qkv_bias": True,
  }


_TIMM_HEAD_WIDTH = 64  # of every vit_* of timm whose config names no other


def _timm_values(config, shapes):
  given = config.get("model_args", {})
  width, channels, patch, _ = shapes["patch_embed.proj.weight"]
  depth = 1 + max(
    int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")
  )
  has_class = "cls_token" in shapes
  patches = shapes["pos_embed"][1] - has_class
  pool = _setting(config, "global_pool", ("token", "avg"), "token")
  head = shapes.get("head.weight")
  if pool == "avg" and has_class:
    raise ValueError(
      "global_pool='avg' with a class token; our mean includes this token"
    )
  return _vision(**{
    "model.width": width,
    "model.depth": depth,
    "model.num_heads": given.get("num_heads", width // _TIMM_HEAD_WIDTH),
    "model.mlp_dim": shapes["blocks.0.mlp.fc1.weight"][0],
    "model.mlp": "gelu_exact",
    "model.norm_epsilon": 1e-6,
    "model.patch_size": patch,
    "model.pool": "class" if pool == "token" else "mean",
    "data.image_size": round(patches**0.5) * patch,
    "data.channels": channels,
    "data.num_classes": head[0] if head else None,
  })  # fmt: skip


def _timm_entries(values):
  heads, layer, width = values["model.num_heads"], "blocks.{}.", "model.width"
  has_class = values["model.pool"] == "class"
  patches = (values["data.image_size"] // values["model.patch_size"]) ** 2
  shape = (patches + has_class, values[width])
  return [
    *[_vector("cls_token", "class_token", (-1,), (1, 1, -1))] * has_class,
    _vector("pos_embed", "position", shape, (1, *shape)),
    *_patches(
      "patch_embed.proj", values["model.patch_size"], values["data.channels"]
    ),
    *_norm(f"{layer}norm1", "attn_residual/norm_in", True),
    *_norm(f"{layer}norm2", "mlp_residual/norm_in", True),
    *_fused(f"{layer}attn.qkv", heads, axis=0),
    *_from_heads(f"{layer}attn.proj", "attn/out", heads, True),
    *_linear(f"{layer}mlp.fc1", "mlp/up", True),
    *_linear(f"{layer}mlp.fc2", "mlp/down", True),
    *_norm("norm", "norm", True),
    *_linear("head", "head", True),
  ]


FAMILIES = {  # by the model_type of transformers; timm has none
  "llama": Family("lm", _llama_values, _llama_entries, _llama_described),
  "gpt_neox": Family(
    "lm", _gpt_neox_values, _gpt_neox_entries, _gpt_neox_described
  ),
  "vit": Family("vit", _vit_values, _vit_entries, _vit_described),
  "timm": Family("vit", _timm_values, _timm_entries),
}
BLOCKS = {"lm": "stack/blocks/", "vit": "encoder/blocks/"}
