"""Makes the references of this folder with transformers and timm.

  pip install torch transformers timm
  python tests/references/make.py

llama, gpt_neox, vit, timm   tiny random models as these libraries save them,
                             with inputs and outputs in expected.npz
whisper.npz                  the features of a tone by Whisper's extractor
"""

import pathlib

import numpy as np
import timm
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent


def randomize(model):
  """Randomizes parameters: norms of 1 and biases of 0 would hide mistakes."""
  generator = torch.Generator().manual_seed(1)
  for parameter in model.parameters():
    noise = torch.randn(parameter.shape, generator=generator)
    parameter.data.add_(0.3 * noise)
  return model.eval()


def save(name, model, **inputs):
  """inputs: arrays. The model is called with the first of them."""
  with torch.no_grad():
    outputs = model(torch.from_numpy(next(iter(inputs.values()))))
  logits = getattr(outputs, "logits", outputs).numpy()
  np.savez_compressed(FOLDER / name / "expected.npz", **inputs, logits=logits)


def language_models():
  token_BT = np.random.default_rng(0).integers(0, 12, (2, 9))
  sizes = dict(
    vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    max_position_embeddings=32,
  )  # fmt: skip
  llama = transformers.LlamaConfig(
    **sizes, num_attention_heads=4, num_key_value_heads=2, rope_theta=5e5,
    rms_norm_eps=1e-3, tie_word_embeddings=False,
  )  # fmt: skip
  gpt_neox = transformers.GPTNeoXConfig(
    **sizes, num_attention_heads=2, rotary_pct=0.25, layer_norm_eps=1e-3,
    use_parallel_residual=True,
  )  # fmt: skip
  for name, model in (
    ("llama", transformers.LlamaForCausalLM(llama)),
    ("gpt_neox", transformers.GPTNeoXForCausalLM(gpt_neox)),
  ):
    randomize(model).save_pretrained(FOLDER / name)
    save(name, model, token=token_BT)


def vision_models():
  image_BCHW = np.random.default_rng(0).normal(size=(2, 3, 8, 8))
  image_BCHW = image_BCHW.astype(np.float32)
  config = transformers.ViTConfig(
    hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=12, image_size=8, patch_size=4, num_labels=3,
  )  # fmt: skip
  vit = randomize(transformers.ViTForImageClassification(config))
  vit.save_pretrained(FOLDER / "vit")
  save("vit", vit, image=image_BCHW)
  for name, pool in (("timm", "token"), ("timm_mean", "avg")):
    model = timm.create_model(
      "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=8, depth=2,
      num_heads=2, mlp_ratio=1.5, num_classes=3, global_pool=pool,
      class_token=pool == "token", fc_norm=False,
    )  # fmt: skip
    timm.models.save_for_hf(
      randomize(model), FOLDER / name, safe_serialization=True
    )
    save(name, model, image=image_BCHW)


def whisper():
  time = np.arange(4000) / 16000
  tone = np.sin(2 * np.pi * (200 + 6400 * time) * time)
  audio_S = (0.3 * tone * np.exp(-8 * time)).astype(np.float32)
  extractor = transformers.WhisperFeatureExtractor()
  features_BMT = extractor(audio_S, sampling_rate=16000, return_tensors="np")[
    "input_features"
  ]
  np.savez_compressed(
    FOLDER / "whisper.npz", features=features_BMT[0, :, :25].T
  )


if __name__ == "__main__":
  torch.manual_seed(0)
  language_models()
  vision_models()
  whisper()
