"""The families that the decoder computes, and what each of them changes.

| field of `decoder.Config` | qwen3 | qwen2 | llama   | phi3     | gemma3_text |
|---------------------------|-------|-------|---------|----------|-------------|
| qk_norm                   | yes   |       |         |          | yes         |
| qkv_bias                  |       | yes   |         |          |             |
| hidden_act                | silu  | silu  | silu    | silu     | gelu (tanh) |
| norm_offset               |       |       |         |          | yes         |
| output_norms              |       |       |         |          | yes         |
| embedding_scale           |       |       |         |          | yes         |
| query_scale               |       |       |         |          | own number  |
| sliding_window            |       |       |         | of all   | of 5 in 6   |
| rope_local_theta          |       |       |         |          | yes         |
| rope_scaling              |       |       | llama3  | longrope | linear      |
| fused in a checkpoint     |       |       |         | qkv, mlp |             |

An empty cell is the decoder's default. To register another family, write one
file like those beside this one and add its line here.
"""

from opera_jax.models.families import (
  family,
  gemma3,
  llama,
  phi3,
  qwen2,
  qwen3,
)

FAMILIES: dict[str, family.Family] = {
  each.model_type: each
  for each in (
    qwen3.QWEN3,
    qwen2.QWEN2,
    llama.LLAMA,
    phi3.PHI3,
    gemma3.GEMMA3,
  )
}
# Mixtures of experts whose dense relatives are read.
EXPERTS = (
  "qwen2_moe",
  "qwen3_moe",
  "qwen3_next",
  "mixtral",
  "phimoe",
  "llama4",
)
