"""Synthesises the cold-start traces of a run, and selects among them.

  python -m experiments.synthesize --config=configs/tiny.py --workdir=runs/tiny

Writes `synthesize/traces` and `select/traces`: JSONL beside a TFDS data set,
with a card. Trains the base model first where the workdir has none.

Kill it and give the same command again: it goes on. Give it on several
machines that see the folder: they divide the work. On the hosts of one TPU
slice add --config.runtime.distributed=auto; with --config.mesh.data the number
of hosts, and fsdp the devices of one, each host works by itself.
"""

from absl import app, flags, logging
from etils import epy

from opera_jax import config_flag

# Read when first used: --help and a mistyped flag need none of them.
with epy.lazy_imports():
  from opera_jax.run import setup, workdir
  from opera_jax.sharding import runtime
  from opera_jax.stages import (
    cold_start,
    config_check,
    dataset_card,
    preflight,
    supervised,
  )
  from opera_jax.synthesis import filters
  from opera_jax.train import checkpoint

_CONFIG = config_flag.define("configs/tiny.py")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run.", required=True
)


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)
  config = _CONFIG.value
  runtime.start(**config.runtime, folder=_WORKDIR.value)
  config_check.check(config.to_dict(), {"synthesize", "select"}, _WORKDIR.value)
  searching = cold_start.Search(**config.synthesis)
  selecting = config.select.to_dict()
  selecting.pop("rl")  # of the RL stage
  rules = filters.Rules(**selecting)
  with checkpoint.Preemption() as preemption:
    with preemption.exit_at_once():
      run = setup.setup(
        _WORKDIR.value,
        temperature=config.rollout.temperature,
        **{name: config[name] for name in setup.SECTIONS},
      )
    preflight.synthesis(run, searching)
    supervised.base(
      run,
      supervised.Recipe(**config.base),
      preemption,
      path=config.checkpoint,
    )
    about = dataset_card.Card(**config.card)
    cold_start.synthesize(run, searching, about, preemption)
    cold_start.select(run, rules, config.reward.keywords, about, preemption)
  workdir.redone(_WORKDIR.value)


if __name__ == "__main__":
  app.run(main)
