"""Runs a user's function, named by its import path, in a subprocess.

    config.reward.terms = "verifiable + 0.5*my_package.my_module:my_reward"

    def my_reward(prompts, completions, **columns) -> list[float]

Every argument is a list with one entry per completion: the prompt's text, the
completion's text, and the columns of the data set (with `id`, `task` and
`reference` among them). It returns a list, tuple or array with one finite
number per completion.

The function runs in another process, with the `sys.path` and the working
directory of the run. Its module is imported once, so a model that the module
loads stays loaded between calls. A call that exceeds its time limit kills the
process. Arguments are copies. JAX sees no accelerator there
(`JAX_PLATFORMS=cpu`), since the run uses them, and environment variables that
look like secrets are not passed on: name those that the function needs in
`config.reward.environment`. This is not a sandbox: the function has all your
rights; see SECURITY.md.

In a notebook, write the function to a file first, with a cell that begins with
`%%writefile my_reward.py`, and name it "my_reward:my_reward": no other process
can import what is defined in the notebook itself.

In a run of several processes, each process calls it with the completions of its
own prompts: groups are never split, and each is evaluated once.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from opera_jax import structs
from opera_jax.rewards import function_worker

START_SECONDS = 600.0  # time limit of importing the module
REPLY_BYTES = 1 << 28
_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
# Variables with such names, or with a password in their value, are not passed
# on.
_SECRET_NAME = re.compile(
  r"KEY|TOKEN(?!IZER)|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE
)
_SECRET_VALUE = re.compile(r"://[^/\s]*:[^/\s]*@")
_RESERVED = ("prompts", "completions")


class FunctionError(ValueError):
  """A user's function raised, ended its process, or returned invalid values."""


@dataclasses.dataclass(frozen=True)
class _Named:
  """A function given by its import path, and its process.

  Attributes:
    path: "package.module:function".
    timeout: seconds that a call may take.
    environment: variables that the function sees although they look like keys.
  """

  path: str
  timeout: float = 60.0
  environment: tuple[str, ...] = ()

  @functools.cached_property
  def process(self) -> "Process":
    """Where the function is loaded and runs."""
    return Process(self.path, self.environment)


@dataclasses.dataclass(frozen=True)
class Reward(_Named):
  """Calls the function once per step; each process passes its own prompts."""

  by_host: ClassVar[bool] = True

  def probe(self, prompts: Sequence[structs.Prompt]) -> None:
    """Loads the function, and checks the names of the columns.

    Args:
      prompts: that it will be asked about.

    Raises:
      FunctionError: it cannot be imported, or a column has the name of an
        argument.
    """
    self.process.start()
    _columns(self.path, prompts)

  def logprob_request(
    self, rollouts: structs.Rollouts
  ) -> structs.LogprobRequest:
    """Nothing is scored."""
    return structs.LogprobRequest()

  def rewards(
    self, rollouts: structs.Rollouts, result: structs.LogprobResult
  ) -> dict[str, np.ndarray]:
    """The function's values, float32 [B, N]; see `values` for errors."""
    tasks = [
      rollouts.prompts[rollouts.prompt_index(r)]
      for r in range(len(rollouts.completions))
    ]
    values_R = self.values(tasks, rollouts.texts)
    shape = (len(rollouts.prompts), rollouts.samples)
    return {"total": values_R.reshape(shape)}

  def values(
    self, tasks: Sequence[structs.Prompt], texts: Sequence[str]
  ) -> np.ndarray:
    """Calls the function on completions; returns float32 [R].

    Args:
      tasks: the prompt of each completion.
      texts: the completions.

    Raises:
      FunctionError: it raised or ended its process, or its answer is not one
        finite number a completion.
      TimeoutError: it took too long.
    """
    given = self.process.call(
      "floats",
      f"must return {len(tasks)} finite numbers, one a completion, in a list",
      ([t.prompt for t in tasks], list(texts)),
      _columns(self.path, tasks),
      self.timeout,
    )
    # A number beyond float32 becomes infinite, and is refused as such.
    with np.errstate(over="ignore"):
      values_R = np.asarray(given, np.float64).astype(np.float32)
    if values_R.shape != (len(tasks),) or not np.isfinite(values_R).all():
      raise FunctionError(
        f"The function {self.path!r} must return {len(tasks)} finite numbers, "
        f"one a completion; got {len(values_R)}, the first of them "
        f"{values_R[:8]}."
      )
    return values_R


@dataclasses.dataclass(frozen=True)
class Choice(_Named):
  """A user's function that chooses among the candidates of trace synthesis.

      def my_choice(prompt, thought, candidates) -> int

  All arguments are text, `candidates` a list of texts. It returns the index of
  one of them.
  """

  def __call__(
    self, prompt: str, thought: str, candidates: Sequence[str]
  ) -> int:
    """The index of the candidate to keep, as the function says.

    Raises:
      FunctionError: it raised or ended its process, or gave no whole number.
      TimeoutError: it took too long.
    """
    return self.process.call(
      "index",
      "must return the index of one of its candidates, a whole number from 0 "
      f"to {len(candidates) - 1}",
      (prompt, thought, list(candidates)),
      {},
      self.timeout,
    )


class Process:
  """A subprocess that has loaded one function; started on first use.

  Safe to use from several threads; one call runs at a time. The process ends
  with the object that started it.
  """

  def __init__(self, path: str, environment: Sequence[str] = ()):
    """Starts nothing yet.

    Args:
      path: "package.module:function".
      environment: variables handed on although they look like keys.

    Raises:
      FunctionError: the path names no function that can be imported.
    """
    if path.startswith("__main__:"):
      raise FunctionError(
        f"The function {path!r} lies in a notebook or in the script itself, "
        "which no other process can import. Write it to a file (in a notebook, "
        'a cell that begins with "%%writefile my_reward.py") and name it '
        '"my_reward:function".'
      )
    if not _PATH.fullmatch(path):
      raise FunctionError(
        f"{path!r} is no path of a function. Write "
        '"package.module:function", with the package on PYTHONPATH.'
      )
    self._path, self._environment = path, tuple(environment)
    self._lock = threading.Lock()
    self._child: Any = None  # a Popen while it runs
    self._sock: Any = None  # its socket
    self._end: Any = None

  def start(self) -> None:
    """Starts the process and imports the function, if not yet done.

    Raises:
      FunctionError: it cannot be imported, or is no plain function.
      TimeoutError: the import took too long.
    """
    with self._lock:
      self._start()

  def call(
    self,
    shape: str,
    promise: str,
    args: tuple[Any, ...],
    keywords: Mapping[str, Any],
    timeout: float,
  ) -> Any:
    """Calls the function with copies of the arguments.

    Args:
      shape: "floats" or "index", what it must give back.
      promise: the same in words, for errors: "must return ...".
      args: its arguments; anything that can be pickled.
      keywords: its arguments by name.
      timeout: seconds that sending, the call and the answer may take together.

    Returns:
      list[float], or int.

    Raises:
      FunctionError: it raised, ended its process, or broke the promise.
      TimeoutError: it took too long; the process is ended.
    """
    call = {"shape": shape, "args": args, "keywords": keywords}
    try:
      body = pickle.dumps(call | {"seconds": timeout})
    except (
      *(pickle.PicklingError, TypeError, AttributeError),
      *(ValueError, RecursionError),
    ) as error:
      raise FunctionError(
        f"The function {self._path!r} runs in a process of its own, and a "
        f"column of the data cannot be sent there: {error}. Leave it out of "
        "the data, or store it as text or numbers."
      ) from error
    with self._lock:
      self._start()
      reply = self._exchange(
        body,
        timeout,
        f"The function {self._path!r} took longer than {timeout:g} s for one "
        "call and was ended. Make it faster, or raise config.reward.timeout.",
      )
    if "wrong" in reply:
      raise FunctionError(
        f"The function {self._path!r} {promise}; it returned {reply['wrong']}."
      )
    if "raised" in reply:
      raise FunctionError(
        f"The function {self._path!r} raised {reply['summary']}; it {promise}."
        f"{self._withheld(reply['trace'])}\n{reply['trace']}"
      )
    return reply["value"]

  def close(self) -> None:
    """Ends the process; the next call starts another."""
    if self._end is not None:
      self._end()
    self._child = self._sock = self._end = None

  def _start(self) -> None:
    if self._child is not None and self._child.poll() is None:
      return
    self.close()
    ours, theirs = socket.socketpair()
    with theirs:
      self._child = subprocess.Popen(
        [
          *(sys.executable, "-P", function_worker.__file__),
          str(theirs.fileno()),
        ],
        env=_passed_on(self._environment),
        stdin=subprocess.DEVNULL,
        pass_fds=(theirs.fileno(),),
        start_new_session=True,
      )
    self._sock = ours
    self._end = weakref.finalize(self, _end, self._child, ours)
    begun = {
      "sys_path": [str(entry) for entry in sys.path],
      "path": self._path,
      "parent": os.getpid(),
    }
    reply = self._exchange(
      pickle.dumps(begun),
      START_SECONDS,
      f"The module of {self._path!r} took longer than {START_SECONDS:g} s to "
      "import and was ended. Load less in it.",
    )
    if "wrong" in reply:
      self.close()
      raise FunctionError(
        f"The function {self._path!r} is {reply['wrong']}. Name a function "
        "that takes lists and returns a list."
      )
    if "raised" in reply:
      self.close()
      more = "" if reply["missing"] else f"\n{reply['trace']}"
      raise FunctionError(
        f"The function {self._path!r} cannot be imported: {reply['summary']}. "
        'Write "package.module:function", with the package on PYTHONPATH.'
        f"{self._withheld(reply['trace'])}{more}"
      )

  def _exchange(self, body: bytes, seconds: float, late: str) -> dict[str, Any]:
    """Sends one message and reads the reply within `seconds`."""
    deadline = time.monotonic() + seconds
    kept = False
    try:
      self._sock.settimeout(seconds)
      self._sock.sendall(function_worker.HEADER.pack(len(body)) + body)
      (size,) = function_worker.HEADER.unpack(
        self._read(function_worker.HEADER.size, deadline)
      )
      if size > REPLY_BYTES:
        raise FunctionError(
          f"The function {self._path!r} answers with {size} bytes, more than "
          f"{REPLY_BYTES}. It must return one number a completion."
        )
      reply = json.loads(self._read(size, deadline))
      kept = True
      return reply
    except TimeoutError:
      raise TimeoutError(late) from None
    except (ConnectionError, EOFError):
      raise FunctionError(
        f"The function {self._path!r} ended its own process"
        f"{self._epitaph()}. It must return its numbers; what it writes "
        "before that stands above."
      ) from None
    finally:
      # Also if the run is interrupted, since the late reply would be taken for
      # that of the next call.
      if not kept:
        self.close()

  def _read(self, size: int, deadline: float) -> bytes:
    parts = []
    while size:
      left = deadline - time.monotonic()
      if left <= 0:
        raise TimeoutError
      self._sock.settimeout(left)
      part = self._sock.recv(min(size, 1 << 20))
      if not part:
        raise EOFError
      parts.append(part)
      size -= len(part)
    return b"".join(parts)

  def _epitaph(self) -> str:
    try:
      code = self._child.wait(timeout=1)
    except subprocess.TimeoutExpired:
      return ""
    if code < 0:
      return f" by the signal {signal.Signals(-code).name}"
    return f" with the exit code {code}"

  def _withheld(self, trace: str) -> str:
    """A hint if the function needs a variable that was not passed on."""
    names = [
      name
      for name in os.environ
      if name not in _passed_on(self._environment)
      and re.search(rf"\b{re.escape(name)}\b", trace)
    ]
    if not names:
      return ""
    return (
      f" It was not given the environment variable {names[0]}, which looks "
      "like a key: name it in config.reward.environment if it needs it."
    )


def _end(child: subprocess.Popen, sock: socket.socket) -> None:
  """Ends the process and its children, first gently, then by SIGKILL."""
  sock.close()
  if child.poll() is None:
    with contextlib.suppress(subprocess.TimeoutExpired):
      child.wait(timeout=0.2)
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(child.pid, signal.SIGKILL)
  child.wait()


def _passed_on(allowed: Sequence[str]) -> dict[str, str]:
  """Our environment without secrets, except for variables allowed by name."""
  out = {
    name: value
    for name, value in os.environ.items()
    if name in allowed
    or not (_SECRET_NAME.search(name) or _SECRET_VALUE.search(value))
  }
  out["PYTHONUNBUFFERED"] = "1"  # its output before a crash is shown
  if "JAX_PLATFORMS" not in allowed:
    out["JAX_PLATFORMS"] = "cpu"  # the run holds the accelerators
  return out


def _columns(
  path: str, tasks: Sequence[structs.Prompt]
) -> dict[str, list[Any]]:
  """One list per column; `id`, `task` and `reference` come first.

  Raises:
    FunctionError: a data column has the name of an argument.
  """
  columns: dict[str, list[Any]] = {
    "id": [t.id for t in tasks],
    "task": [t.task for t in tasks],
    "reference": [t.reference for t in tasks],
  }
  for name in sorted({n for t in tasks for n in t.columns} - set(columns)):
    if name in _RESERVED:
      raise FunctionError(
        f"The data has a column {name!r}, and the function {path!r} gets "
        f"{' and '.join(_RESERVED)} as arguments of their own. Rename the "
        "column in the data, or name it in config.data.fields."
      )
    columns[name] = [t.columns.get(name) for t in tasks]
  return columns
