"""O1-pruner (arXiv 2501.12570): rewards answers shorter than the group's
mean."""

from opera_jax.configs.methods import base


def method(config):
  """Sets what defines the method."""
  config.reward.terms = "verifiable + 0.2*length + 0*opera"
  config.reward.options = {"length": {"kind": "o1_pruner"}}
  config.rl.advantage = "dr_grpo"


def get_config(arg: str = ""):
  """Returns the config; `arg` is a size of `base.build`."""
  return base.build(arg, method)
