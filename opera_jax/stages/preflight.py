"""Tries everything external to a run before its expensive stages.

This covers a judge's endpoint, a user's reward, and the functions that choose
among candidates or RL prompts. If one of them fails, the run ends before its
base model is trained.
"""

from opera_jax.run import setup as setup_lib
from opera_jax.run import workdir as workdir_lib
from opera_jax.sharding import exchange
from opera_jax.stages import cold_start, rl_select
from opera_jax.synthesis import rl_filter


def synthesis(run: setup_lib.Run, settings: cold_start.Search) -> None:
  """Loads the user's function that chooses among candidates, if there is one.

  Args:
    run: the run, before its first stage; nothing is tried if synthesis has
      finished.
    settings: of the search.

  Raises:
    ValueError: the function cannot be imported or called.
  """
  if workdir_lib.result(run.workdir, "synthesize"):
    return
  choice = cold_start.user_choice(run, settings)
  if choice is not None:
    choice.process.close()


def rl(run: setup_lib.Run, rules: rl_filter.Rules) -> None:
  """Tries the run's rewards, and the function that scores RL prompts.

  Args:
    run: the run, before its first stage; nothing is tried if RL has finished.
    rules: that select RL prompts.

  Raises:
    ValueError: a user's function cannot be imported or called.
    RuntimeError: a judge does not answer.
  """
  if workdir_lib.result(run.workdir, "rl"):
    return
  run.reward_scorer.probe(run.tasks.rl)
  if not rl_select.uses_function(rules):
    return
  if not workdir_lib.result(run.workdir, "select_rl"):
    exchange.map_across_processes([rules.judge], lambda _: _tried(run, rules))


def _tried(run: setup_lib.Run, rules: rl_filter.Rules) -> list[None]:
  judge = rl_select.user_judge(run, rules)
  judge.probe([p for p in run.tasks.rl if p.task == "open_ended"])
  judge.process.close()
  return [None]
