"""Compares synthesis methods of the cold start by the resulting SFT model.

  python -m experiments.ablate --config=configs/cold_start.py --workdir=runs/cs

This uses storyworld. For real prompts, as in configs/open_ended.py, add:

  --config.task=configs/open_ended.py \\
  --config.flags="--config.data.path=FILE.jsonl ..."

Every row starts from the same base model, synthesises traces with its own
search, and trains on the traces that the filters keep. Expect a table of
held-out measures per row. `--config=configs/cold_start.py:smoke` runs two rows
and one seed, for tests.
"""

import ml_collections

TINY = "configs/tiny.py"
# (name of the row, its config, "" for config.task, flags that change it).
ROWS = (
  ("lowest perplexity", "", ""),
  ("plain sampling", "", "--config.synthesis.budget=0"),
  ("score of the candidate alone", "", "--config.synthesis.score=candidate"),
  (
    "no keywords: every step",
    "",
    "\"--config.synthesis.stop_words=('\\n\\n',)\"",
  ),
  ("first five reflections", "", "--config.synthesis.budget=5"),
  ("rewriting (REER)", "", "--config.synthesis.method=rewrite"),
)
MEASURES = (
  *("logp_thought", "score", "facts", "correct"),
  *("r_self", "reflections", "tokens", "finished"),
)
QUESTIONS = (
  (
    "What does the search add to plain sampling?",
    "lowest perplexity",
    "plain sampling",
    "logp_thought",
  ),
  (
    "Whose completions make the reference likelier?",
    "lowest perplexity",
    "plain sampling",
    "score",
  ),
  (
    "And the log-probability of the candidate alone?",
    "score of the candidate alone",
    "lowest perplexity",
    "logp_thought",
  ),
)


def get_config(arg: str = ""):
  """Returns the config; `arg` is "" or "smoke"."""
  config = ml_collections.ConfigDict()
  config.task = TINY + (":smoke" if arg else "")
  config.size = ""
  config.flags = ""  # flags passed to every run of the grid
  config.rows = ROWS
  config.questions = QUESTIONS
  config.baseline = "lowest perplexity"
  config.seeds = (0, 1, 2)
  # configs/ablations.py explains these fields.
  config.start, config.shared = "base", ("tokenizer", "base")
  config.stages = "synthesize,select,sft"
  config.first, config.last = "base", "sft"
  config.each = "--config.synthesis.seed={seed} --config.sft.seed={seed}"
  config.measures = MEASURES
  config.curves, config.over = ("sft/loss", "sft/entropy"), "sft/tokens"
  config.samples = 2  # per held-out prompt
  config.probes = 0  # rewards play no role here, so none are probed
  config.resamples = 2_000
  if arg == "smoke":
    config.rows, config.questions = ROWS[:2], QUESTIONS[:1]
    config.seeds = (0,)
    config.resamples = 200
  elif arg:
    raise ValueError(f"configs/cold_start.py takes '' or 'smoke', got {arg!r}.")
  return config.lock()
