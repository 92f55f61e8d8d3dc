"""PPO (arXiv 1707.06347) with GAE (arXiv 1506.02438), KL in the reward.

The critic is a head on the policy, trained in the same update.
"""

from opera_jax.configs.methods import base


def method(config):
  """Sets what defines the method."""
  config.reward.terms = "verifiable + 0*opera"
  config.rl.advantage = "gae"
  config.rl.advantage_options = {"gae": {"gamma": 1.0, "lam": 0.95}}
  config.rl.value_coef = 0.5
  config.rl.kl_in = "reward"
  config.rl.kl_estimator = "k1"
  config.rl.dual_clip = 0.0


def get_config(arg: str = ""):
  """Returns the config; `arg` is a size of `base.build`."""
  return base.build(arg, method)
