"""Training steps of other libraries, for benchmarks/train_step.py."""

import time

# {side: the package that it needs}
PACKAGES = {"huggingface": "transformers", "timm": "timm"}


def huggingface(config, batch, timed):
  """Measures a step of LlamaForCausalLM with the sizes of config.model.

  The output layer shares the embedding, as ours does. timed: a function that
  takes the step and a function that waits, and returns seconds.
  """
  import torch
  import transformers

  model, data = config.model, config.data
  shape = transformers.LlamaConfig(
    vocab_size=data.vocab_size,
    hidden_size=model.width,
    intermediate_size=model.mlp_dim,
    num_hidden_layers=model.depth,
    num_attention_heads=model.num_heads,
    max_position_embeddings=data.length,
    tie_word_embeddings=True,
    use_cache=False,
  )
  shape._attn_implementation = "sdpa"
  with torch.device("cuda"):
    network = transformers.LlamaForCausalLM(shape).to(torch.bfloat16)
  token_BT = torch.randint(data.vocab_size, (batch, data.length), device="cuda")
  return _step(
    network, lambda net: net(input_ids=token_BT, labels=token_BT).loss, timed
  )


def timm(config, batch, timed):
  """Measures a step of timm's ViT-B/16, with the drop path of config."""
  import timm as library
  import torch

  with torch.device("cuda"):
    network = library.create_model(
      "vit_base_patch16_224",
      num_classes=config.data.num_classes,
      drop_path_rate=config.model.drop_path,
    ).to(torch.bfloat16)
    size = config.data.image_size
    image_BCHW = torch.randn((batch, 3, size, size), dtype=torch.bfloat16)
    target_B = torch.randint(config.data.num_classes, (batch,))
  criterion = torch.nn.CrossEntropyLoss(
    label_smoothing=config.augment.label_smoothing
  )
  return _step(
    network, lambda net: criterion(net(image_BCHW).float(), target_B), timed
  )


def _step(network, loss_of, timed):
  """The row of a compiled training step with the fused AdamW."""
  import torch

  torch.set_float32_matmul_precision("high")
  network.train()
  compiled = torch.compile(network)
  optimizer = torch.optim.AdamW(
    network.parameters(), lr=1e-4, weight_decay=0.1, fused=True
  )

  def step():
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of(compiled)
    loss.backward()
    optimizer.step()
    return loss

  def wait(_):
    torch.cuda.synchronize()

  begin = time.perf_counter()
  wait(step())
  compile_seconds = time.perf_counter() - begin
  return {
    "compile_seconds": compile_seconds,
    "seconds": timed(step, wait),
    "loss": float(step().detach()),
    "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    "params": sum(x.numel() for x in network.parameters()),
    "device": torch.cuda.get_device_name(),
  }
