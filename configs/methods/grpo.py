"""GRPO (arXiv 2402.03300) on verifiable answers."""

from opera_jax.configs.methods import base


def method(config):
  """Sets what defines the method."""
  config.reward.terms = "verifiable + 0*opera"
  config.rl.advantage = "grpo"


def get_config(arg: str = ""):
  """Returns the config; `arg` is a size of `base.build`."""
  return base.build(arg, method)
