"""Trackers get every step once, from libraries that only a name imports.

The libraries are stood in for by modules of the functions that their
documentation states: `wandb.init(project, id, name, dir, resume)`, whose run
has `log(data, step)` and `finish()`, and `trackio.init(project, name, resume)`,
`trackio.log(metrics, step)` and `trackio.finish()`.
"""

import importlib.machinery
import sys
import types

import pytest

from opera_jax.train import metrics as run_metrics
from opera_jax.train import trackers


@pytest.fixture
def libraries(monkeypatch):
  """Calls of stand-in libraries, by name."""
  calls = {"wandb": [], "trackio": []}

  class Run:
    def log(self, data, step=None, commit=None):
      calls["wandb"].append(("log", data, step))

    def finish(self, exit_code=None, quiet=None):
      calls["wandb"].append(("finish",))

  def wandb_init(
    project=None, id=None, name=None, dir=None, resume=None, config=None
  ):
    calls["wandb"].append(("init", id, resume, config))
    return Run()

  def trackio_init(project, name=None, config=None, resume="never"):
    calls["trackio"].append(("init", name, resume, config))

  modules = {
    "wandb": {"init": wandb_init},
    "trackio": {
      "init": trackio_init,
      "log": lambda metrics, step=None: calls["trackio"].append(
        ("log", metrics, step)
      ),
      "finish": lambda: calls["trackio"].append(("finish",)),
    },
  }
  for name, members in modules.items():
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
  return calls


def _metrics(folder, last_step=None):
  log = trackers.parse("jsonl, wandb, trackio")
  return run_metrics.Metrics(folder, "metrics", last_step=last_step, log=log)


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_a_resumed_run_repeats_no_step_and_starts_no_other(
  tmp_path, libraries, library
):
  folder = tmp_path / "run" / "rl"
  killed = _metrics(folder)
  for step in (1, 2, 3):
    killed.write(step, {"loss": step / 2, "kl": float("nan")})
  resumed = _metrics(folder, last_step=1)
  for step in (2, 3, 4):
    resumed.write(step, {"loss": step / 2})
  resumed.close()
  first, *logged, ended = libraries[library]
  again = next(c for c in logged if c[0] == "init")
  assert first[1] == again[1]  # one run
  assert again[2] == ("allow" if library == "wandb" else "must")
  assert [c for c in logged if c[0] == "log"] == [
    ("log", {"loss": step / 2}, step) for step in (1, 2, 3, 4)
  ]
  assert ended == ("finish",)
  # Settings, which may hold what is secret, stay here.
  assert first[3] is again[3] is None
  assert [x["step"] for x in run_metrics.read(resumed.path)] == [1, 2, 3, 4]
  assert not (folder / "tensorboard").exists()
  _metrics(folder).close()  # the stage starts over
  assert libraries[library][-2][1] != first[1]


@pytest.mark.parametrize(
  ("log", "said"),
  [
    ("jsonl,tensorbord", "names some of jsonl, tensorboard"),
    ("tensorboard", "and jsonl always"),
    ("jsonl,jsonl", "each once"),
    ("jsonl,wandb", "pip install wandb"),
  ],
)
def test_names_that_cannot_be_are_refused(monkeypatch, log, said):
  monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=said):
    trackers.parse(log)


def test_nothing_is_imported_that_is_not_named(tmp_path, libraries):
  metrics = run_metrics.Metrics(tmp_path, "rl")
  metrics.write(1, {"loss": 1.0})
  metrics.close()
  assert libraries == {"wandb": [], "trackio": []}
  assert not (tmp_path / "trackers.json").exists()
