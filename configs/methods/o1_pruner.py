"""O1-pruner (arXiv 2501.12570): shorter than the group's mean pays."""

from opera_jax.configs.methods import base


def method(config):
  """What defines it."""
  config.reward.terms = "verifiable + 0.2*length + 0*opera"
  config.reward.options = {"length": {"kind": "o1_pruner"}}
  config.rl.advantage = "dr_grpo"


def get_config(arg: str = ""):
  """Returns the config; see `base` for `arg`."""
  return base.build(arg, method)
