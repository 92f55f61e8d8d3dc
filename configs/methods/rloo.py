"""RLOO (arXiv 2402.14740): leave-one-out baseline, KL in the reward."""

from opera_jax.configs.methods import base


def method(config):
  """What defines it."""
  config.reward.terms = "verifiable + 0*opera"
  config.rl.advantage = "rloo"
  config.rl.kl_in = "reward"
  config.rl.kl_estimator = "k1"


def paper(config):
  """The paper's sizes."""
  config.rl.kl_coef = 0.03


def get_config(arg: str = ""):
  """Returns the config; see `base` for `arg`."""
  return base.build(arg, method, paper)
