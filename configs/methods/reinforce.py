"""REINFORCE (Williams, 1992) with the batch's mean as baseline."""

from opera_jax.configs.methods import base


def method(config):
  """What defines it."""
  config.reward.terms = "verifiable + 0*opera"
  config.rl.advantage = "reinforce"
  config.rl.kl_coef = 0.0


def get_config(arg: str = ""):
  """Returns the config; see `base` for `arg`."""
  return base.build(arg, method)
