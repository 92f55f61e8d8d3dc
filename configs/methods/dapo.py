"""DAPO (arXiv 2503.14476): clip-higher, token mean, dynamic sampling.

Overlong shaping counts tokens of the completion.
"""

from opera_jax.configs.methods import base


def method(config):
  """Sets what defines the method."""
  config.reward.terms = "verifiable + length"
  limit = config.rollout.max_new_tokens
  config.reward.options = {
    "length": {"kind": "overlong", "limit": limit, "buffer": limit // 5}
  }
  config.rl.clip_low, config.rl.clip_high = 0.2, 0.28
  config.rl.dual_clip = 10.0
  config.rl.kl_coef = 0.0
  config.rl.reduction = "token_mean"
  config.rl.max_resamples = 9
  # Overlong shaping makes rewards differ even in a group of wrong answers, so
  # accuracy decides which groups are kept.
  config.rl.filter_reward = "verifiable"


def paper(config):
  """Sets the sizes of the method's paper."""
  config.rl.prompts = 512
  config.rl.mini_batch = 32
  config.rollout.max_new_tokens = 20_480


def get_config(arg: str = ""):
  """Returns the config; `arg` is a size of `base.build`."""
  return base.build(arg, method, paper)
