"""A user's function runs in a process of its own and keeps its promise."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from conftest import ROOT

from opera_jax import structs
from opera_jax.rewards import compose, function

# One function a fault: name -> (body, what the error must say of it).
BROKEN = {
  "nothing": ("return None", "NoneType: None"),
  "scalar": ("return 0.5", "float: 0.5"),
  "generator": ("return (0.5 for _ in prompts)", "a generator"),
  "mapping": ("return {'a': 1.0, 'b': 2.0}", r"dict: \{'a': 1.0"),
  "coroutine": (
    "async def later():\n    return [0.5] * 4\n  return later()",
    "a coroutine",
  ),
  "words": ("return 'abcd'", "str: 'abcd'"),
  "word_in_it": ("return [1, 2, 'x', 4]", "at place 2 str: 'x'"),
  "none_in_it": ("return [1, None, 3, 4]", "at place 1 NoneType"),
  "nested": ("return [[1], [2], [3], [4]]", "at place 0 list"),
  "table": ("import numpy\n  return numpy.ones((4, 1))", "at place 0 list"),
  "complex_in_it": ("return [1, 2, 3, 1j]", "at place 3 complex"),
  "too_few": ("return [0.0] * 3", "got 3"),
  "not_a_number": ("return [0.0, 1.0, float('nan'), 1.0]", "got 4.* nan"),
  "beyond_float32": ("return [1e300, 0, 0, 0]", "got 4.* \\[inf"),
  "beyond_float": ("return [10 ** 400, 0, 0, 0]", "place 0 a number beyond"),
  "raises": ("raise KeyError('mine')", "KeyError: 'mine'"),
  "exits": ("import sys\n  sys.exit(3)", "SystemExit: 3"),
  "interrupts": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
  "unhappy": (
    "class Own(BaseException):\n    pass\n  raise Own('sad')",
    "Own: sad",
  ),
  "leaves": ("import os\n  os._exit(7)", "ended its own process.*code 7"),
  "crashes": (
    "import os, signal\n  os.kill(os.getpid(), signal.SIGSEGV)",
    "ended its own process by the signal SIGSEGV",
  ),
  "bottomless": ("return bottomless(prompts, completions)", "RecursionError"),
}
MODULE = """
import json, os, re, time

LOADED = time.time()

def shout(prompts, completions, **columns):
  assert columns["reference"] == ["4", "4", "7", "7"]
  assert columns["level"] == [1, 1, None, None]
  return [len(c) + len(p) for p, c in zip(prompts, completions)]

def arrays(prompts, completions, **_):
  import numpy
  return numpy.arange(len(prompts), dtype=numpy.float32)

def booleans(prompts, completions, **_):
  return tuple(len(text) > 1 for text in completions)

def loaded(prompts, completions, **_):
  return [LOADED % 1e5] * len(prompts)

def spoil(prompts, completions, **columns):
  prompts.clear()
  columns["list"][0].append(1)
  columns.clear()
  return [0.0] * len(completions)

def visible(prompts, completions, **columns):
  with open(columns["place"][0], "w") as file:
    json.dump(dict(os.environ), file)
  return [0.0] * len(completions)

def needs_key(prompts, completions, **columns):
  return [float(os.environ["MY_API_KEY"])] * len(prompts)

def asleep(prompts, completions, **_):
  time.sleep(60)

def held(prompts, completions, **_):
  re.match("(a+)+$", "a" * 60 + "b")

async def later(prompts, completions, **_):
  return [0.0] * len(prompts)

def yields(prompts, completions, **_):
  yield 0.0

def last(prompt, thought, candidates):
  return len(candidates) - 1

number = 3
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
  """The folder of `user_functions`, on `sys.path` as a user's would be."""
  folder = tmp_path_factory.mktemp("user")
  text = MODULE
  for name, (body, _) in BROKEN.items():
    text += f"\ndef {name}(prompts, completions, **columns):\n  {body}\n"
  (folder / "user_functions.py").write_text(text)
  for name, body in (
    ("leaving", "raise SystemExit(2)"),
    ("misspelt", "import numpyy"),
    ("unparsable", "def f(:"),
    ("failing", "1 / 0"),
  ):
    (folder / f"user_{name}.py").write_text(f"{body}\ndef f(): pass\n")
  sys.path.insert(0, str(folder))
  yield folder
  sys.path.remove(str(folder))


@pytest.fixture
def tasks():
  return [
    structs.Prompt("a", "math", "qq", "4", {"level": 1}),
    structs.Prompt("b", "math", "q", "7"),
  ]


def _rows(tasks):
  return [tasks[0], tasks[0], tasks[1], tasks[1]]


TEXTS = ["a", "bb", "ccc", ""]


def _reward(name, **settings):
  return function.Reward(f"user_functions:{name}", **settings)


def test_it_sees_lists_and_columns(module, rollouts, tasks):
  case = rollouts([["a", "bb"], ["ccc", ""]], tasks)
  got = _reward("shout").rewards(case, None)["total"]
  np.testing.assert_array_equal(got, [[3, 4], [4, 1]])
  assert got.dtype == np.float32


@pytest.mark.parametrize(
  "name, want", [("arrays", [0, 1, 2, 3]), ("booleans", [0, 1, 1, 0])]
)
def test_arrays_and_booleans_are_numbers(module, tasks, name, want):
  got = _reward(name).values(_rows(tasks), TEXTS)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_names_function_and_rule(module, tasks, name):
  reward = _reward(name)
  with pytest.raises(function.FunctionError) as failure:
    reward.values(_rows(tasks), TEXTS)
  text = str(failure.value)
  assert f"'user_functions:{name}'" in text
  assert re.search(BROKEN[name][1], text, re.DOTALL), text
  assert "must return" in text
  # The process goes on, or is started anew.
  with pytest.raises(function.FunctionError):
    reward.values(_rows(tasks), TEXTS)


def test_an_error_inside_comes_with_its_traceback(module, tasks):
  with pytest.raises(function.FunctionError) as failure:
    _reward("raises").values(_rows(tasks), TEXTS)
  text = str(failure.value)
  assert "user_functions.py" in text and "in raises" in text
  assert "function_worker.py" not in text


@pytest.mark.parametrize("name", ["asleep", "held"])
def test_a_call_ends_at_its_limit_whatever_it_does(module, tasks, name):
  reward = _reward(name, timeout=0.5)
  reward.process.start()
  child = reward.process._child
  begin = time.monotonic()
  with pytest.raises(TimeoutError, match=f"{name}' took longer than 0.5 s"):
    reward.values(_rows(tasks), TEXTS)
  assert time.monotonic() - begin < 3
  assert child.poll() == -signal.SIGKILL


def test_the_module_is_imported_once_and_again_after_a_timeout(module, tasks):
  reward = _reward("loaded")
  first = reward.values(_rows(tasks), TEXTS)
  np.testing.assert_array_equal(reward.values(_rows(tasks), TEXTS), first)
  reward.process.close()
  assert (reward.values(_rows(tasks), TEXTS) != first).all()
  # One that was killed while it was idle (for its memory, say) starts again.
  reward.process._child.kill()
  reward.process._child.wait()
  reward.values(_rows(tasks), TEXTS)


def test_it_gets_copies(module):
  columns = {"list": [[0]]}
  prompts = [structs.Prompt("a", "math", "q", "1", columns)]
  _reward("spoil").values(prompts, ["x"])
  assert columns == {"list": [[0]]} and prompts[0].prompt == "q"


def test_keys_are_withheld_unless_asked_for(module, tmp_path, monkeypatch):
  secrets = {
    "MY_API_KEY": "17",
    "HF_TOKEN": "hf_secret",
    "my_secret": "s",
    "DB_PASSWORD": "p",
    "AWS_SECRET_ACCESS_KEY": "a",
    "DATABASE_URL": "postgres://me:hunter2@host/db",
  }
  for name, value in (secrets | {"HARMLESS": "yes"}).items():
    monkeypatch.setenv(name, value)

  def seen(**settings):
    place = tmp_path / "seen.json"
    task = structs.Prompt("a", "math", "q", "1", {"place": str(place)})
    _reward("visible", **settings).values([task], ["x"])
    return json.loads(place.read_text())

  given = seen()
  assert not set(secrets) & set(given)
  assert given["HARMLESS"] == "yes" and given["JAX_PLATFORMS"] == "cpu"
  given = seen(environment=("MY_API_KEY",))
  assert set(secrets) & set(given) == {"MY_API_KEY"}
  task = structs.Prompt("a", "math", "q", "1")
  with pytest.raises(function.FunctionError, match="config.reward.environment"):
    _reward("needs_key").values([task], ["x"])
  got = _reward("needs_key", environment=("MY_API_KEY",)).values([task], ["x"])
  assert got == [17]


@pytest.mark.parametrize("column", ["prompts", "completions"])
def test_a_column_called_as_an_argument_is_named(module, column):
  tasks = [structs.Prompt("a", "math", "q", "1", {column: "x"})]
  for ask in (
    lambda: _reward("arrays").values(tasks, ["x"]),
    lambda: _reward("arrays").probe(tasks),
  ):
    with pytest.raises(
      function.FunctionError, match=f"column '{column}'.*arrays.*Rename"
    ):
      ask()


@pytest.mark.parametrize("column", ["self", "timeout", "shape", "promise"])
def test_any_other_column_is_just_a_column(module, column):
  tasks = [structs.Prompt("a", "math", "q", "1", {column: "x"})]
  assert _reward("arrays").values(tasks, ["x"]) == [0]


@pytest.mark.parametrize(
  "path, message",
  [
    ("nowhere:f", "'nowhere:f' cannot be imported.*No module named 'nowhere'"),
    ("user_functions:nothing_there", "cannot be imported.*nothing_there"),
    ("user_leaving:f", "cannot be imported: SystemExit: 2"),
    ("user_misspelt:f", "cannot be imported.*numpyy"),
    ("user_unparsable:f", "cannot be imported.*SyntaxError"),
    ("user_failing:f", "cannot be imported.*ZeroDivisionError.*line 1"),
    ("user_functions:number", "is int, which cannot be called"),
    ("user_functions:later", "is a coroutine function"),
    ("user_functions:yields", "is a generator function"),
    ("__main__:f", "%%writefile my_reward.py"),
    ("../x:f", "is no path of a function"),
    ("user_functions:a b", "is no path of a function"),
  ],
)
def test_what_cannot_be_loaded_is_refused_at_once(module, path, message):
  with pytest.raises(ValueError) as failure:
    compose.build(path, {}, 1.0)
  assert re.search(message, str(failure.value), re.DOTALL), failure.value


def test_it_never_runs_in_this_process(module):
  compose.build("user_functions:shout", {}, 1.0)
  assert "user_functions" not in sys.modules


def test_a_choice_is_an_index(module):
  choice = function.Choice("user_functions:last")
  assert choice("p", "t", ["a", "b", "c"]) == 2
  for name in ("nothing", "scalar", "words"):
    (module / f"choose_{name}.py").write_text(
      f"def f(prompt, thought, candidates):\n  {BROKEN[name][0]}\n"
    )
    with pytest.raises(function.FunctionError, match="whole number from 0 to"):
      function.Choice(f"choose_{name}:f")("p", "t", ["a", "b"])


SCRIPT = """
import os, signal, sys, threading, time
from opera_jax.rewards import function
from opera_jax import structs
task = structs.Prompt("a", "math", "q", "1")
reward = function.Reward("user_functions:{name}", timeout=4.0)
reward.process.start()
print(reward.process._child.pid, flush=True)
{then}
"""


def _alive(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  return stat.rpartition(")")[2].split()[0] != "Z"


def _script(module, name, then):
  text = textwrap.dedent(SCRIPT).format(name=name, then=then)
  process = subprocess.Popen(
    [sys.executable, "-"],  # a script on standard input, as in a notebook
    cwd=ROOT,
    env=dict(os.environ, PYTHONPATH=f"{ROOT}:{module}"),
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  process.stdin.write(text)
  process.stdin.close()
  return process, int(process.stdout.readline())


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, then",
  [
    ("arrays", "pass"),
    ("arrays", "os.kill(os.getpid(), signal.SIGKILL)"),
    ("held", "reward.values([task], ['x'])"),
    (
      "held",
      "threading.Timer(0.5, os.kill, (os.getpid(), 9)).start(); "
      "reward.values([task], ['x'])",
    ),
  ],
)
def test_it_outlives_no_run(module, name, then):
  """Ended with the run, killed with it, or soon after a killed one."""
  process, pid = _script(module, name, then)
  process.wait(timeout=60)
  deadline = time.monotonic() + 15
  while _alive(pid) and time.monotonic() < deadline:
    time.sleep(0.1)
  assert not _alive(pid)


def test_an_interrupt_ends_the_call_and_what_it_left(module, tasks):
  reward = _reward("asleep")
  reward.process.start()
  child = reward.process._child
  previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
  try:
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with pytest.raises(KeyboardInterrupt):
      reward.values(_rows(tasks), TEXTS)
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)
  assert child.poll() is not None
