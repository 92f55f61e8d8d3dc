"""Phi-3.5-mini (arXiv 2404.14219): fused projections, LongRoPE.

LongRoPE has two sets of factors, and transformers takes the long one as soon as
a sequence has more than 4,096 tokens. All keys would then be rotated anew, also
those in a cache. Here a run uses one set from beginning to end; see
`config.model.rope_factors`.
"""

from collections.abc import Mapping
from typing import Any

from opera_jax.models.families import family


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
  window = raw.get("sliding_window") or 0
  # Published as 262,144, which is more than the context.
  unused = window >= raw.get("max_position_embeddings", 0)
  return {"sliding_window": 0 if unused else window}


PHI3 = family.Family(
  model_type="phi3",
  architecture="Phi3ForCausalLM",
  fields={"qk_norm": False},
  layer={**family.NORMS, **family.FUSED_INPUTS, **family.OUTPUTS},
  read=_read,
  write=lambda config: {
    "sliding_window": config.sliding_window or None,
    "original_max_position_embeddings": (
      config.rope_scaling.original_max_position_embeddings
      if config.rope_scaling
      else config.max_position_embeddings
    ),
  },
  unsupported=family.no_bias,
)
