"""Entropy minimisation plus correctness, a baseline of arXiv 2509.05489."""

from opera_jax.configs.methods import base


def method(config):
  """Sets what defines the method."""
  config.reward.terms = "verifiable + 0.2*entropy + 0*opera"
  config.rl.advantage = "dr_grpo"


def get_config(arg: str = ""):
  """Returns the config; `arg` is a size of `base.build`."""
  return base.build(arg, method)
