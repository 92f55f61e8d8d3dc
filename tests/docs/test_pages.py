"""Names that the pages use are names of the code."""

import ast
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from conftest import ROOT

from opera_jax import structs
from opera_jax.train import state as train_state
from opera_jax.train import step
from scripts.docs import config_fields

DOCS = ROOT / "docs"
# Tables that scripts of ours wrote; they name the fields of their time.
MEASURED = {
  *("plans/README.md", "evidence/README.md"),
  *("ablation/README.md", "ablation/cold_start.md"),
}
PAGES = {
  str(path.relative_to(DOCS)): path.read_text("utf-8")
  for path in sorted(DOCS.rglob("*.md"))
}
OURS = {name: text for name, text in PAGES.items() if name not in MEASURED}
# A reading of the clock, and no metric.
_NOT_METRICS = {"time/start"}
FOLDERS = "benchmarks|configs|docs|experiments|kernels|notebooks|opera_jax"
PATH = re.compile(rf"`((?:{FOLDERS}|scripts|tests)/[\w./]*)`")
# No call, such as config.lock().
FIELD = re.compile(r"\bconfig\.([a-z]\w*(?:\.[a-z]\w*)*)\b(?!\()")


@pytest.mark.parametrize("page", OURS)
def test_rows_of_a_table_have_its_columns(page):
  columns = None
  for number, line in enumerate(OURS[page].splitlines(), 1):
    if not line.startswith("|"):
      columns = None
      continue
    found = line.replace("\\|", "").count("|")
    columns = columns or found
    assert found == columns, f"{page}:{number}: {line}"


@pytest.mark.parametrize("page", OURS)
def test_paths_exist(page):
  for name in PATH.findall(OURS[page]):
    assert (ROOT / name).exists(), f"docs/{page} names {name}"


@pytest.mark.parametrize("page", OURS)
def test_config_fields_exist(page):
  source = (ROOT / "configs" / "common.py").read_text("utf-8")
  sections = config_fields.read(source)
  known = {s.name for s in sections} | {"json"}  # config.json is a file
  free = set()  # mappings, whose keys are the user's
  for field in (f for s in sections for f in s.fields):
    known.add(field.name)
    if field.kind == "mapping":
      free.add(field.name)
  for name in FIELD.findall(OURS[page]):
    inside = any(name.startswith(f"{mapping}.") for mapping in free)
    assert name in known or inside, f"docs/{page} names config.{name}"


def _examples(page) -> dict[str, dict]:
  """What the Python examples of a page define, by the file they name."""
  out = {}
  for name, code in re.findall(
    r"```python\n# (\S+\.py)\n(.*?)```", PAGES[page], re.DOTALL
  ):
    out[name] = {}
    exec(compile(code, name, "exec"), out[name])
  return out


def test_the_examples_of_your_own_work():
  made = _examples("your_own.md")
  reward = made["my_rewards.py"]["short"]
  texts = ["one two", "word " * 300]
  assert reward(["p", "p"], texts, id=["1", "2"]) == [1.0, 0.0]
  config = made["configs/mine.py"]["get_config"]()
  assert (config.rl.steps, config.data.path) == (50, "tasks.jsonl")
  assert config.is_locked


@pytest.mark.parametrize("page", OURS)
def test_drivers_exist(page):
  for name in re.findall(r"python -m experiments\.(\w+)", OURS[page]):
    assert (ROOT / "experiments" / f"{name}.py").is_file(), name


def test_the_glossary_has_at_most_twenty_terms():
  rows = [r for r in PAGES["glossary.md"].splitlines() if r.startswith("| ")]
  terms = rows[1:]  # the first is the head
  assert 10 <= len(terms) <= 20


def test_the_faq_answers_a_dozen_questions():
  assert len(re.findall("^## ", PAGES["faq.md"], re.MULTILINE)) >= 12


def _documented() -> set[str]:
  """Metric names in the first column of the tables of docs/metrics.md."""
  out = set()
  for row in PAGES["metrics.md"].splitlines():
    if row.startswith("| `"):
      out |= set(re.findall(r"`([\w/.]+)`", row.split("|")[1]))
  return out


def _written(path) -> set[str]:
  """Metric names in a file: strings such as "time/step", and keys that are
  stored in a dictionary called `out` or `metrics`."""
  out = set()
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      if re.fullmatch(r"[a-z_]+(/[a-z_]+)+", node.value):
        out.add(node.value)
    elif isinstance(node, ast.Assign):
      for target in node.targets:
        name = ast.unparse(target)
        if name == "out" and isinstance(node.value, ast.Dict):
          out |= {k.value for k in node.value.keys if k is not None}
        found = re.fullmatch(r"(?:out|metrics)\['([\w/]+)'\]", name)
        out |= {found[1]} if found else set()
  return out


@pytest.mark.parametrize(
  "file",
  [
    "opera_jax/rl/step_metrics.py",
    "opera_jax/rl/rollouts.py",
    "opera_jax/rl/advantages.py",
    "opera_jax/train/step.py",
    "opera_jax/stages/cold_start.py",
    "experiments/opera_rl.py",
  ],
)
def test_metrics_that_the_code_writes_are_documented(file):
  written = _written(ROOT / file) - _NOT_METRICS
  assert written, file
  assert sorted(written - _documented()) == []


def _logprob(params, batch):
  """A model of one parameter, with the heads of a critic and a teacher."""
  logprob_RT = params["w"] * jnp.ones(batch.tokens.shape)
  heads = {
    "value": logprob_RT,
    "top_logprob": jnp.stack([logprob_RT, logprob_RT], axis=-1) - 1.0,
  }
  return logprob_RT, -logprob_RT, heads


def _update_metrics(make, **settings) -> set[str]:
  """Names that an update returns, traced and not run."""
  zeros_RT = jnp.zeros((2, 3))
  batch = structs.Batch(
    tokens=jnp.zeros((2, 3), jnp.int32),
    positions=jnp.zeros((2, 3), jnp.int32),
    segments=jnp.ones((2, 3), jnp.int32),
    loss_mask=jnp.ones((2, 3)),
    advantage=zeros_RT,
    old_logprob=zeros_RT,
    ref_logprob=zeros_RT,
    extra={
      "value": zeros_RT,
      "returns": zeros_RT,
      "top_logprob": jnp.full((2, 3, 2), -1.0),
    },
  )
  optimizer = optax.sgd(1.0)
  state = train_state.create({"w": jnp.ones(())}, optimizer, jax.random.key(0))
  update = make(_logprob, optimizer, **settings)
  _, metrics = jax.eval_shape(update, state, batch)
  return set(metrics)


def _sft_logprob(make):
  def build(logprob_fn, optimizer, **settings):
    return make(lambda p, b: logprob_fn(p, b)[:2], optimizer, **settings)

  return build


@pytest.mark.parametrize(
  "make, settings",
  [
    (step.make_policy_update, {"value_coef": 1.0, "divergence_coef": 1.0}),
    (step.make_preference_update, {}),
    (_sft_logprob(step.make_sft_update), {"name": "sft"}),
    (_sft_logprob(step.make_sft_update), {"name": "pretrain"}),
  ],
  ids=["policy", "preference", "sft", "pretrain"],
)
def test_metrics_of_the_updates_are_documented(make, settings):
  names = _update_metrics(make, **settings)
  assert len(names) >= 5
  assert sorted(names - _documented()) == []
