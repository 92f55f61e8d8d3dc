"""Fine-tunes the base model of a run on its selected traces.

  python -m experiments.sft --config=configs/tiny.py --workdir=runs/tiny

Reads `select/traces`, writes `sft/model`.
"""

from absl import flags, logging
from etils import epy

from opera_jax import commands, config_flag

# Imported on first use, so that --help and flag errors are fast.
with epy.lazy_imports():
  from opera_jax.run import record, sizes, workdir
  from opera_jax.sharding import runtime
  from opera_jax.stages import config_check, supervised
  from opera_jax.train import checkpoint

_CONFIG = config_flag.define("configs/tiny.py")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run.", required=True
)


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)
  given = _CONFIG.value
  workdir.existing(_WORKDIR.value)
  runtime.start(**given.runtime, folder=_WORKDIR.value)
  config_check.check(given.to_dict(), {"sft"}, _WORKDIR.value)
  config = sizes.derive(given)
  with checkpoint.Preemption() as preemption:
    with preemption.exit_at_once():
      run = record.begin(_WORKDIR.value, given, ("sft",))
    recipe = supervised.Recipe(**config.sft.to_dict())
    supervised.sft(run, recipe, preemption)
  workdir.redone(_WORKDIR.value)
  if runtime.is_main_process():
    record.end(_WORKDIR.value, given, ("sft",))


if __name__ == "__main__":
  commands.run(main)
