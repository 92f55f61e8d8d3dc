"""What the benchmarks against tunix share: its model, a tokenizer for it."""


def tunix_model(folder, config, mesh=None):
  """Their Qwen3 of the same sizes, with the weights saved in the folder."""
  import jax.numpy as jnp
  from tunix.models.qwen3 import model, params

  theirs = model.ModelConfig(
    num_layers=config.num_hidden_layers,
    vocab_size=config.vocab_size,
    embed_dim=config.hidden_size,
    hidden_dim=config.intermediate_size,
    num_heads=config.num_attention_heads,
    head_dim=config.head_dim,
    num_kv_heads=config.num_key_value_heads,
    rope_theta=int(config.rope_theta),
    norm_eps=config.rms_norm_eps,
    use_tied_embedding=config.tie_word_embeddings,
  )
  return params.create_model_from_safe_tensors(
    folder, theirs, mesh, dtype=jnp.float32
  )


class Numbers:
  """A tokenizer of numbers written out, for a sampler that takes strings."""

  def encode(self, text, **_):
    return [int(word) for word in text.split()]

  def decode(self, ids, **_):
    return " ".join(map(str, ids))

  def bos_id(self):
    return None

  def eos_id(self):
    return 1

  def pad_id(self):
    return 0


def toy(prompts, completions, **_) -> list[float]:
  """Something that differs between samples and costs nothing."""
  return [len(text) % 7 / 7 for text in completions]
