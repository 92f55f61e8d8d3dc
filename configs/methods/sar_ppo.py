"""SAR (arXiv 2509.05489) hosted by PPO: one critic, no KL.

The paper samples once a prompt; R_SA needs no group. Its critic is a second
model at 2e-6; here it is a head on the policy, trained in the same update.
"""

from opera_jax.configs.methods import base


def method(config):
  """What defines it."""
  config.reward.terms = "verifiable + 0.2*sar"
  config.rl.advantage = "gae"
  config.rl.value_coef = 0.5
  config.rl.kl_coef = 0.0


def paper(config):
  """The paper's sizes."""
  config.rl.samples = 2  # the least that a group may have
  config.rl.prompts = 512
  config.rl.mini_batch = 256


def get_config(arg: str = ""):
  """Returns the config; see `base` for `arg`."""
  return base.build(arg, method, paper)
