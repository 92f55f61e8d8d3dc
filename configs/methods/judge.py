"""A rubric judge in the reward's place, an ablation of arXiv 2606.25757.

Name the endpoint: --config.reward.options.judge.endpoint=https://host/v1 and
.model; the key is read from OPENAI_API_KEY.
"""

from configs.methods import base


def method(config):
  """What defines it."""
  config.reward.parts = "judge + format"
  config.reward.options = {
    "judge": {
      "endpoint": "http://127.0.0.1:8000/v1",
      "model": "judge",
      "mode": "rubric",
      "cache": "",
    }
  }
  config.rl.tasks = ("open_ended",)


def get_config(arg: str = ""):
  """Returns the config; see `base` for `arg`."""
  return base.build(arg, method)
