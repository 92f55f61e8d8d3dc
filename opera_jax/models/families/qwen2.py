"""Qwen2 and Qwen2.5 (arXiv 2412.15115): biased queries, keys and values."""

from opera_jax.models.families import family

QWEN2 = family.Family(
  model_type="qwen2",
  architecture="Qwen2ForCausalLM",
  fields={"qk_norm": False, "qkv_bias": True},
  layer={
    **family.NORMS,
    **family.INPUTS,
    **family.OUTPUTS,
    **family.QKV_BIAS,
  },
  write=lambda config: {
    "max_window_layers": config.num_hidden_layers,
    "sliding_window": None,
    "use_sliding_window": False,
  },
  unsupported=family.no_window,
)
