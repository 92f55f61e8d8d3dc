"""Synthesises the cold-start traces of a run, and filters them.

  python -m experiments.synthesize --config=configs/tiny.py --workdir=runs/tiny

Writes `synthesize/traces` and `select/traces`: JSONL and a TFDS data set, with
a dataset card. Trains the base model first if the workdir has none.

After a kill, the same command resumes. Run it on several machines that share
the folder, and they split the work. On the hosts of one TPU slice add
--config.runtime.distributed=auto. If --config.mesh.data is the number of hosts
and fsdp the devices per host, each host works independently.
"""

from absl import flags, logging
from etils import epy

from opera_jax import commands, config_flag

# Imported on first use, so that --help and flag errors are fast.
with epy.lazy_imports():
  from opera_jax.run import record, sizes, workdir
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

STAGES = ("base", "synthesize", "select")


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)
  given = _CONFIG.value
  runtime.start(**given.runtime, folder=_WORKDIR.value)
  config_check.check(given.to_dict(), {"synthesize", "select"}, _WORKDIR.value)
  config = sizes.derive(given)
  search = cold_start.Search(**config.synthesis)
  select = config.select.to_dict()
  select.pop("rl")  # settings of the RL stage
  rules = filters.Rules(**select)
  with checkpoint.Preemption() as preemption:
    with preemption.exit_at_once():
      run = record.begin(_WORKDIR.value, given, STAGES, needs={"synthesis": 1})
    preflight.synthesis(run, search)
    supervised.base(
      run,
      supervised.Recipe(**config.base),
      preemption,
      path=config.checkpoint,
    )
    card = dataset_card.Card(**config.card)
    cold_start.synthesize(run, search, card, preemption)
    cold_start.select(run, rules, config.reward.keywords, card, preemption)
  workdir.redone(_WORKDIR.value)
  if runtime.is_main_process():
    record.end(_WORKDIR.value, given, STAGES)


if __name__ == "__main__":
  commands.run(main)
