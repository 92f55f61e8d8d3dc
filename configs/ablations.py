"""A grid of methods and seeds on one task, from one SFT model.

  python -m experiments.ablate --config=configs/ablations.py --workdir=runs/abl

`--config=configs/ablations.py:smoke` is two rows and one seed, for tests. Own
data: `--config.flags="--config.data.kind=jsonl --config.data.path=FILE"`,
which every run of the grid is given.
"""

import ml_collections

OPERA = "configs/methods/opera.py"
SAR = "configs/methods/sar.py"
OPPO = "configs/methods/oppo.py"

# Name of a row, its method's config, what is changed in it.
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
# What a row's difference from another answers, by which measure.
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
  config.task = f"{OPERA}:ablation"  # of base model, SFT and evaluation
  config.size = "ablation"  # argument of every method's config
  config.flags = ""  # given to every run of the grid
  config.rows = ROWS
  config.questions = QUESTIONS
  config.baseline = "opera"  # what rows are compared with
  config.seeds = (0, 1, 2)
  # Stages of the model that all begin with, folders of it that cells share,
  # stages of a cell, the models before and after, and flags of every cell.
  config.start, config.shared = START, ("tokenizer", "base", "sft")
  config.stages, config.first, config.last = "rl", "sft", "rl"
  config.each = EACH.format(seed="{seed}", tokens=60_000)
  config.measures = MEASURES
  config.curves, config.over = CURVES, "rollout/tokens"
  config.samples = 2  # a held-out prompt
  config.probes = 32  # held-out prompts that are probed
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
