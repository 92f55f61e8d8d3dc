"""What lies outside of a run is tried before anything expensive.

A judge's endpoint, a user's reward, the functions that choose among candidates
or RL prompts: a run that would end at the first of them ends before its base
model is trained.
"""

from opera_jax.rewards import function
from opera_jax.sharding import exchange
from opera_jax.stages import cold_start, rl_select
from opera_jax.stages import setup as setup_lib
from opera_jax.stages import workdir as workdir_lib
from opera_jax.synthesis import rl_filter


def check(
  run: setup_lib.Run,
  stages: set[str],
  *,
  searching: cold_start.Search,
  rules: rl_filter.Rules,
) -> None:
  """Tries what the stages to come will ask; finished stages ask no more.

  Args:
    run: the run, before its first stage.
    stages: that will run.
    searching: settings of the trace synthesis.
    rules: of the choice of RL prompts.

  Raises:
    ValueError: a user's function that cannot be called.
    RuntimeError: a judge that does not answer.
  """

  def ahead(stage: str) -> bool:
    return not workdir_lib.result(run.workdir, stage)

  if "synthesize" in stages and ahead("synthesize"):
    choice = cold_start.user_choice(run, searching)
    if choice is not None:
      choice.process.close()
  if "rl" in stages and ahead("rl"):
    run.scorer.probe(run.tasks.rl)
    if rl_select.asks_function(rules) and ahead("select_rl"):
      opened = [p for p in run.tasks.rl if p.task == "open_ended"]
      exchange.each([rules.judge], lambda _: [_tried(run, rules, opened)])


def _tried(run, rules, opened) -> None:
  judge: function.Reward = rl_select.user_judge(run, rules)
  judge.probe(opened)
  judge.process.close()
