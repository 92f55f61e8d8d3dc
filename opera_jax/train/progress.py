"""Shows how far a stage is: a bar on a terminal, lines elsewhere.

    rl: 12/40 steps, 3,200 tokens/s, 0.5 steps/s, 24 s, < 1 min left, reward
    0.41, KL 0.002, length 230 tokens

A step may take minutes, so a thread says now and then what is running:
"compiling update", "sampling", "scoring", "updating".
"""

import sys
import threading
import time
from typing import TextIO

import tqdm

from opera_jax.sharding import compile_log, runtime


class Progress:
  """Speed, remaining time, and what is running; process 0 shows them."""

  def __init__(
    self,
    total: int,
    description: str,
    *,
    unit: str = "step",
    done: int = 0,
    seconds_between_lines: float = 10.0,
    seconds_of_silence: float = 30.0,
    file: TextIO | None = None,
  ):
    """Starts the clock.

    Args:
      total: number of units.
      description: label of the work.
      unit: name of a unit.
      done: units that earlier runs have finished.
      seconds_between_lines: interval of the lines without a terminal.
      seconds_of_silence: after so long without a line, one says what is
        running.
      file: to write to; default standard error.
    """
    self._file = file or sys.stderr
    self._shows = runtime.is_main_process()
    self._bar = tqdm.tqdm(
      total=total,
      initial=done,
      desc=description,
      unit=unit,
      file=self._file,
      disable=not (self._shows and self._file.isatty()),
      dynamic_ncols=True,
    )
    self._description, self._unit = description, unit
    self._total, self._first, self._done = total, done, done
    self._tokens = 0
    self._phase, self._values = "", ""
    self._said_end = False  # the line of the last unit is printed
    self._start = self._printed = time.monotonic()
    self._every, self._silence = seconds_between_lines, seconds_of_silence
    self._lock, self._closed = threading.Lock(), threading.Event()
    compile_log.spans()  # so that `compiling` knows of programs from now on
    self._watch = threading.Thread(target=self._tell, daemon=True)
    if self._shows:
      self._watch.start()

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  @property
  def done(self) -> int:
    """Units finished."""
    return self._done

  def phase(self, name: str) -> None:
    """Notes what runs from now on, such as "sampling"."""
    self._phase = name

  def show(self, values: dict[str, str]) -> None:
    """Sets numbers that follow the speed, formatted, by name."""
    self._values = ", ".join(f"{name} {text}" for name, text in values.items())

  def update(self, count: int = 1, *, tokens: int = 0) -> None:
    """Adds `count` finished units with `tokens` processed tokens."""
    with self._lock:
      self._done += count
      self._tokens += tokens
      if not self._bar.disable:
        self._bar.set_postfix_str(self._postfix(), False)
        self._bar.update(count)
      elif time.monotonic() - self._printed >= self._every:
        self._print()

  def close(self) -> None:
    """Ends the bar, or prints the last line."""
    self._closed.set()
    if self._watch.is_alive():
      self._watch.join()
    if self._bar.disable:
      if not self._said_end:
        self._print()
    else:
      self._bar.set_postfix_str(self._postfix(), False)
      self._bar.close()

  def _tell(self) -> None:
    """Says what is running, while nothing else is said."""
    while not self._closed.wait(1.0):
      with self._lock:
        if not self._bar.disable:
          self._bar.set_postfix_str(self._postfix(), True)
        elif time.monotonic() - self._printed >= self._silence:
          self._print()

  def _running(self) -> str:
    program = compile_log.compiling()
    return f"compiling {program}" if program else self._phase

  def _postfix(self) -> str:
    words = [f"{self._speed():,.0f} tokens/s"] if self._tokens else []
    words += [self._values] if self._values else []
    running = "" if self._closed.is_set() else self._running()
    return ", ".join(words) + (f"; {running}" if running else "")

  def _speed(self) -> float:
    return self._tokens / max(time.monotonic() - self._start, 1e-9)

  def _print(self) -> None:
    if not self._shows:
      return
    self._printed = time.monotonic()
    self._said_end = self._done >= self._total
    spent = self._printed - self._start
    fresh = self._done - self._first
    words = [f"{self._description}: {self._done}/{self._total} {self._unit}s"]
    if self._tokens:
      words.append(f"{self._speed():,.0f} tokens/s")
    if fresh > 0:
      words.append(f"{fresh / max(spent, 1e-9):.3g} {self._unit}s/s")
    words.append(f"{spent:.0f} s")
    if fresh > 0 and self._done < self._total:
      words.append(remaining(spent / fresh * (self._total - self._done)))
    if self._values:
      words.append(self._values)
    running = self._running()
    if running and self._done < self._total:
      words[-1] += f"; {running}"
    print(", ".join(words), file=self._file, flush=True)


def remaining(seconds: float) -> str:
  """Remaining time in hours and minutes: "1:05 h left"."""
  minutes = round(seconds / 60)
  if minutes < 1:
    return "< 1 min left"
  return f"{minutes // 60}:{minutes % 60:02d} h left"
