"""GRPO (arXiv 2402.03300) on answers that can be checked."""

from opera_jax.configs.methods import base


def method(config):
  """What defines it."""
  config.reward.terms = "verifiable + 0*opera"
  config.rl.advantage = "grpo"


def get_config(arg: str = ""):
  """Returns the config; see `base` for `arg`."""
  return base.build(arg, method)
