"""OPPO (arXiv 2605.21851): an oracle's evidence moves a belief in success.

Self-oracle, odds belief, anchored and normalised over the group's tokens.
"""

from opera_jax.configs.methods import base


def method(config):
  """What defines it."""
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
  """Returns the config; see `base` for `arg`."""
  return base.build(arg, method)
