"""SAR (arXiv 2509.05489) with PPO: a critic, no KL.

The paper draws one sample per prompt, since R_SA needs no group. Its critic is
a second model with learning rate 2e-6; here it is a head on the policy, trained
in the same update.
"""

from opera_jax.configs.methods import base


def method(config):
  """Sets what defines the method."""
  config.reward.terms = "verifiable + 0.2*sar"
  config.rl.advantage = "gae"
  config.rl.value_coef = 0.5
  config.rl.kl_coef = 0.0


def paper(config):
  """Sets the sizes of the method's paper."""
  config.rl.samples = 2  # the minimum group size here
  config.rl.prompts = 512
  config.rl.mini_batch = 256


def get_config(arg: str = ""):
  """Returns the config; `arg` is a size of `base.build`."""
  return base.build(arg, method, paper)
