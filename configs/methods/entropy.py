"""Entropy minimisation beside right answers, a baseline of arXiv 2509.05489."""

from opera_jax.configs.methods import base


def method(config):
  """What defines it."""
  config.reward.terms = "verifiable + 0.2*entropy + 0*opera"
  config.rl.advantage = "dr_grpo"


def get_config(arg: str = ""):
  """Returns the config; see `base` for `arg`."""
  return base.build(arg, method)
