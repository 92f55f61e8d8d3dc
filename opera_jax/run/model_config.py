"""The model's config: from its checkpoint, or from the fields of config.model.

A checkpoint says what its model is. Of config.model only what a checkpoint does
not determine (`hf_config.FREE`) is read with one; any other field that is set
must say the same.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from opera_jax.models import decoder, grow_embedding, hf_config, presets, rope

# The sizes of a model that is trained from nothing, where config.model is None.
SMALL = {
  "hidden_size": 128,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 32,
  "intermediate_size": 384,
}


def resolve(
  model: Mapping[str, Any],
  checkpoint: str = "",
  *,
  vocab_size: int = 0,
  added_tokens: bool = False,
  offline: bool = False,
) -> decoder.Config:
  """The config of a run's model.

  Args:
    model: fields of `decoder.Config`; None leaves one to the checkpoint or,
      without one, to `SMALL` and the decoder's defaults.
    checkpoint: directory, GGUF file or hub id; "" for a model that is trained
      from nothing.
    vocab_size: ids of the tokenizer; 0 if it is not known.
    added_tokens: whether the tokenizer has tokens that the checkpoint's has
      not; the embedding grows for them if it must.
    offline: take the sizes of a published model from `presets` and not from
      the hub.

  Raises:
    FileNotFoundError: no such checkpoint.
    ValueError: a field contradicts the checkpoint, or is no field of a decoder;
      more ids than rows; what `hf_config.read` and `decoder.Config` refuse.
  """
  fields = {name: value for name, value in model.items() if value is not None}
  rows = fields.pop("vocab_size", 0)
  if not checkpoint:
    rows = rows or vocab_size
    if rows < vocab_size:
      raise ValueError(
        f"The tokenizer has {vocab_size} ids and config.model.vocab_size is "
        f"{rows}; every id needs a row of the embedding. Raise it, or set 0 to "
        "use the tokenizer's."
      )
    return decoder.Config(**{**SMALL, **fields, "vocab_size": rows})
  published = presets.find(checkpoint) if offline else None
  published = published or hf_config.read(checkpoint)
  stated = {"vocab_size": rows} if rows else {}
  stated |= {k: v for k, v in fields.items() if k not in hf_config.FREE}
  wrong = [
    f"config.model.{name} is {value!r} and the checkpoint's is "
    f"{getattr(published, name)!r}"
    for name, value in stated.items()
    if getattr(published, name) != value
  ]
  if wrong:
    raise ValueError(
      f"{checkpoint} says what its model is, and {'; '.join(wrong)}. Leave "
      "these fields unset, or leave config.checkpoint empty to train a model "
      "from nothing."
    )
  rows = published.vocab_size
  if added_tokens:
    rows = grow_embedding.grown_rows(rows, vocab_size)
  if rows < vocab_size:
    raise ValueError(
      f"The tokenizer has {vocab_size} ids and the embedding of {checkpoint} "
      f"has {rows} rows; every id needs one. Leave config.tokenizer.path empty "
      "to take the checkpoint's own tokenizer."
    )
  free = {k: v for k, v in fields.items() if k in hf_config.FREE}
  return dataclasses.replace(published, vocab_size=rows, **free)


def two_factor_sets(config: decoder.Config) -> bool:
  """Whether LongRoPE has other factors for short texts than for long ones."""
  scaling = config.rope_scaling
  if scaling is None or scaling.kind != "longrope":
    return False
  return scaling.short_factor != scaling.long_factor


def check_context(config: decoder.Config, tokens: int) -> None:
  """Refuses sequences that the model was not made for.

  Args:
    config: of the model.
    tokens: of the longest prompt with its completion.

  Raises:
    ValueError: they are more than the model's context, or than LongRoPE's short
      factors are for.
  """
  lengths = (
    f"config.max_prompt_tokens and config.rollout.max_new_tokens are {tokens} "
    "together"
  )
  if tokens > config.max_position_embeddings:
    raise ValueError(
      f"{lengths}, and the model's context is "
      f"{config.max_position_embeddings} tokens (max_position_embeddings). "
      "Lower one of them."
    )
  if not two_factor_sets(config) or config.rope_factors == "long":
    return
  assert config.rope_scaling is not None
  original = config.rope_scaling.original_max_position_embeddings
  if tokens > original:
    raise ValueError(
      f"{lengths}, and LongRoPE's short factors are for up to {original}. Set "
      "config.model.rope_factors='long', which then holds for every length, or "
      "lower one of them."
    )


def restore(recorded: Mapping[str, Any]) -> decoder.Config:
  """A model's config from what a stage has recorded of it.

  Args:
    recorded: JSON values of `dataclasses.asdict`, without LoRA.
  """
  values = dict(recorded)
  if values.get("rope_scaling") is not None:
    scaling: dict[str, Any] = {
      name: tuple(value) if isinstance(value, list) else value
      for name, value in values["rope_scaling"].items()
    }
    values["rope_scaling"] = rope.Scaling(**scaling)
  return decoder.Config(**values)
