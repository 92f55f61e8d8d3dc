"""OPPO (arXiv 2605.21851): token advantages from a belief in success that an
oracle's log-probabilities update.

Settings: self-oracle, odds belief, anchored, normalised over the group's
  tokens.
"""

from opera_jax.configs.methods import base


def method(config):
  """Sets what defines the method."""
  config.reward.terms = "verifiable + 0*opera"
  config.rl.advantage = "oppo"
  config.rl.advantage_options = {
    "oppo": {
      "oracle": "self",
      "belief": "odds",
      "evidence_clip": 5.0,
      "anchor": True,
      "scale": "tokens",
    }
  }


def get_config(arg: str = ""):
  """Returns the config; `arg` is a size of `base.build`."""
  return base.build(arg, method)
