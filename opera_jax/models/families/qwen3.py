"""Qwen3, dense (arXiv 2505.09388): queries and keys are normed by head."""

from opera_jax.models.families import family

QWEN3 = family.Family(
  model_type="qwen3",
  architecture="Qwen3ForCausalLM",
  fields={"qk_norm": True},
  layer={
    **family.NORMS,
    **family.INPUTS,
    **family.OUTPUTS,
    **family.QK_NORM,
  },
  write=lambda config: {
    "attention_bias": False,
    "max_window_layers": config.num_hidden_layers,
    "sliding_window": None,
    "use_sliding_window": False,
  },
  unsupported=lambda raw: family.no_bias(raw) + family.no_window(raw),
)
