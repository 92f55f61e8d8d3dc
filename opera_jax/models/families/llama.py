"""Llama 3 (arXiv 2407.21783) and what is built like it, such as SmolLM2."""

from opera_jax.models.families import family

LLAMA = family.Family(
  model_type="llama",
  architecture="LlamaForCausalLM",
  fields={"qk_norm": False},
  layer={**family.NORMS, **family.INPUTS, **family.OUTPUTS},
  write=lambda config: {"attention_bias": False, "mlp_bias": False},
  unsupported=family.no_bias,
)
