"""Prints the first sample of a model as early as possible."""

from opera_jax.sharding import clock, runtime
from opera_jax.text import terminal

_CLOSED = "</think>"


def show(stage: str, whose: str, prompt: str, completion: str) -> None:
  """Prints a prompt, the thought after it and the answer, a few lines each.

  Args:
    stage: the current stage.
    whose: description of the model.
    prompt: of the task.
    completion: decoded, with think tags; without "</think>" all of it is the
      thought.
  """
  if not runtime.is_main_process():
    return
  thought, closed, answer = completion.partition(_CLOSED)
  print(
    f"{stage}: first sample of {whose}, {clock.age():.0f} s after the start:"
  )
  for name, text in (
    ("prompt", prompt),
    ("thought", thought.replace("<think>", "", 1)),
    ("answer", answer if closed else "(the thought does not end)"),
  ):
    first, *rest = terminal.excerpt(text, lines=3, width=68)
    print(f"  {name + ':':<8} {first}")
    for line in rest:
      print(" " * 11 + line)
  print(end="", flush=True)
