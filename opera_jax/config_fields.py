"""Names of config fields: which have been renamed, and which do not exist.

Field names followed the field's own words in November 2026. A workdir made
before then does not resume: its recorded settings have the old names.
"""

import difflib
from collections.abc import Collection

# Old path -> new path, and what else changed.
RENAMED = {
  "rl.credit": "rl.advantage",
  "rl.credit_options": "rl.advantage_options",
  "rl.share": "rl.completions_per_row",
  "rl.draws": "rl.max_resamples (the number of draws less 1)",
  "rl.top": "rl.teacher_top_k",
  "rl.max_delta": "rl.max_logprob_diff",
  "rl.max_delta_steps": "rl.max_logprob_diff_steps",
  "reward.parts": "reward.terms",
  "price": "scoring",
  "price.rows": "scoring.batch_size",
  "price.length_buckets": "scoring.prefix_buckets",
  "price.slot_buckets": "scoring.slot_buckets",
  "price.branch_buckets": "scoring.continuation_buckets",
  "synthesis.price": "synthesis.score",
  "synthesis.brakes": "synthesis.stop_words",
  "select.brakes": "select.stop_words",
  "select.max_brakes": "select.max_stop_words",
  "engine.rows": "engine.prompt_slots",
  "model.hidden": "model.hidden_size",
  "model.layers": "model.num_hidden_layers",
  "model.heads": "model.num_attention_heads",
  "model.kv_heads": "model.num_key_value_heads",
  "model.intermediate": "model.intermediate_size",
  "model.norm_epsilon": "model.rms_norm_eps",
  "model.tied": "model.tie_word_embeddings",
}


def fault(path: str, known: Collection[str]) -> str:
  """What to say of a field that no config has.

  Args:
    path: as in "rl.credit", without "config.".
    known: paths of the fields that there are.
  """
  if path in RENAMED:
    return f"config.{path} is now config.{RENAMED[path]}"
  near = difflib.get_close_matches(path, list(known), 1, 0.6)
  hint = f"; did you mean config.{near[0]}?" if near else ""
  return f"config.{path} is no field{hint}"
