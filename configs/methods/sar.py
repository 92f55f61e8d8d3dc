"""SAR (arXiv 2509.05489): R_VR + 0.2 R_SA with Dr.GRPO advantages."""

from opera_jax.configs.methods import base


def method(config):
  """Sets what defines the method."""
  config.reward.terms = "verifiable + 0.2*sar + 0*opera"
  config.rl.advantage = "dr_grpo"
  config.rl.reduction = "constant"
  # Token losses are summed over a response, divided by the constant, and
  # averaged over the responses of an update.
  limit = config.rl.constant or float(config.rollout.max_new_tokens)
  config.rl.constant = limit * config.rl.mini_batch * config.rl.samples


def paper(config):
  """Sets the sizes of the method's paper."""
  config.rl.prompts = 128
  config.rl.samples = 6
  config.rl.mini_batch = 64
  config.rl.constant = 4_096.0
  config.rl.kl_coef = 0.001


def get_config(arg: str = ""):
  """Returns the config; `arg` is a size of `base.build`."""
  return base.build(arg, method, paper)
