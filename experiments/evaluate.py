"""Evaluates the models of a run on held-out prompts, and writes the report.

  python -m experiments.evaluate --config=configs/tiny.py --workdir=runs/tiny

Reads `base/model`, `sft/model` and `rl/model`, those that there are; writes
`evaluate/` and `report.html`.
"""

from absl import flags, logging
from etils import epy

from opera_jax import commands, config_flag

# Imported on first use, so that --help and flag errors are fast.
with epy.lazy_imports():
  from opera_jax.run import initial_model, record, sizes, workdir
  from opera_jax.sharding import runtime
  from opera_jax.stages import config_check, evaluate, reporting
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
  config_check.check(given.to_dict(), {"evaluate", "report"}, _WORKDIR.value)
  config = sizes.derive(given)
  with checkpoint.Preemption() as preemption:
    with preemption.exit_at_once():
      run = record.begin(
        _WORKDIR.value, given, ("evaluate",), needs={"held_out": 1}
      )
    evaluate.evaluate(
      run,
      evaluate.Settings(
        max_new_tokens=config.rollout.max_new_tokens, **config.evaluate
      ),
      preemption,
      lineage=initial_model.lineage(config),
    )
    whole = record.of_run(_WORKDIR.value, given, ("evaluate",))
    reporting.write(run, sizes.derive(whole).to_dict(), preemption)
  workdir.redone(_WORKDIR.value)
  if runtime.is_main_process():
    record.end(_WORKDIR.value, given, ("evaluate",))


if __name__ == "__main__":
  commands.run(main)
