"""A rubric judge in the reward's place, an ablation of arXiv 2606.25757.

Name the endpoint: --config.reward.options.judge.endpoint=https://host/v1 and
.model; the key is read from the environment variable that key_variable names.
Needs requirements-judge.txt. The fields are those of
`opera_jax.rewards.judge.Reward`.
"""

from configs.methods import base


def method(config):
  """What defines it."""
  config.reward.parts = "judge + format"
  config.reward.options = {
    "judge": {
      "endpoint": "http://127.0.0.1:8000/v1",
      "model": "judge",
      "mode": "rubric",  # or "pairwise"
      "opponents": 1,
      "key_variable": "OPENAI_API_KEY",
      "cache": "",
      "timeout": 60.0,
      "retries": 4,
      "parallel": 8,
      "max_tokens": 1024,
      "temperature": 0.0,
      "schema": True,
      "max_failed": 0.1,  # share of a step's questions without an answer
      "prompt_price": 0.0,  # of a million tokens
      "completion_price": 0.0,
    }
  }
  config.rl.tasks = ("open_ended",)


def get_config(arg: str = ""):
  """Returns the config; see `base` for `arg`."""
  return base.build(arg, method)
