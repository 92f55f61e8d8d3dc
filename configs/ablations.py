"""Compares RL methods over seeds on one task, starting from one SFT model.

  python -m experiments.ablate --config=configs/ablations.py --workdir=runs/abl

Expect a table of held-out measures with intervals, per method.
`--config=configs/ablations.py:smoke` runs two rows and one seed, for tests. For
your own data pass flags to every run of the grid:
`--config.flags="--config.data.kind=jsonl --config.data.path=FILE"`.
"""

import ml_collections

OPERA = "configs/methods/opera.py"
SAR = "configs/methods/sar.py"
OPPO = "configs/methods/oppo.py"

# (name of the row, config of its method, flags that change it).
ROWS = (
  ("opera", OPERA, ""),
  ("opera, R_self only", OPERA, "--config.reward.mode=r_self"),
  ("opera, R_ppl only", OPERA, "--config.reward.mode=r_ppl"),
  ("opera, any step", OPERA, "--config.reward.match=any"),
  (
    "opera, bridge",
    OPERA,
    "'--config.reward.bridge=\n</think>\n\n'",
  ),
  ("R_VR (Dr.GRPO)", "configs/methods/dr_grpo.py", ""),
  ("R_VR + 0.2 R_SA", SAR, ""),
  (
    "R_SA only",
    SAR,
    "'--config.reward.terms=sar + 0*opera + 0*verifiable'",
  ),
  ("oppo", OPPO, ""),
  (
    "oppo, no anchoring",
    OPPO,
    "--config.rl.advantage_options.oppo.anchor=False",
  ),
)
# (question, row, row to compare with, measure).
QUESTIONS = (
  ("Does R_SA alone shorten answers?", "R_SA only", "sft", "tokens"),
  (
    "What does R_ppl add to R_self?",
    "opera",
    "opera, R_self only",
    "facts",
  ),
  (
    "Does removing OPPO's anchoring hurt?",
    "oppo, no anchoring",
    "oppo",
    "correct",
  ),
  (
    "What if any step may count, keyword or not?",
    "opera, any step",
    "opera",
    "facts",
  ),
  (
    "What if the thought is closed before y_ref is scored?",
    "opera, bridge",
    "opera",
    "facts",
  ),
  (
    "What does R_SA add to R_VR?",
    "R_VR + 0.2 R_SA",
    "R_VR (Dr.GRPO)",
    "correct",
  ),
)
START = "synthesize,select,sft"
EACH = "--config.rl.seed={seed} --config.rl.token_budget={tokens}"
MEASURES = (
  *("facts", "correct", "tokens", "math_tokens"),
  *("reflections", "r_self", "score", "finished"),
)
CURVES = (
  "reward/mean",
  "completions/mean_length",
  "reward/correct",
  "reward/score",
)


def get_config(arg: str = ""):
  """Returns the config; `arg` is "" or "smoke"."""
  config = ml_collections.ConfigDict()
  config.task = (
    f"{OPERA}:ablation"  # config of the base model, SFT and evaluation
  )
  config.size = "ablation"  # argument of every method config
  config.flags = ""  # flags passed to every run of the grid
  config.rows = ROWS
  config.questions = QUESTIONS
  config.baseline = "opera"  # row that the others are compared with
  config.seeds = (0, 1, 2)
  # start: stages that make the shared model; shared: its folders that every
  # cell links to; stages: stages of a cell; first: models before a cell, comma
  # between them; last: the one after it; each: flags of every cell.
  config.start, config.shared = START, ("tokenizer", "base", "sft")
  config.stages, config.first, config.last = "rl", "sft", "rl"
  config.each = EACH.format(seed="{seed}", tokens=60_000)
  config.measures = MEASURES
  config.curves, config.over = CURVES, "rollout/tokens"
  config.samples = 2  # per held-out prompt
  config.probes = 32  # held-out prompts on which rewards are probed
  config.resamples = 2_000
  if arg == "smoke":
    config.task, config.size = f"{OPERA}:smoke", "smoke"
    config.rows = (ROWS[0], ROWS[6])
    config.questions = (("Which?", "opera", "R_VR + 0.2 R_SA", "correct"),)
    config.seeds = (0,)
    config.each = EACH.format(seed="{seed}", tokens=1_000)
    config.probes = 4
    config.resamples = 200
  elif arg:
    raise ValueError(f"configs/ablations.py takes '' or 'smoke', got {arg!r}.")
  return config.lock()
