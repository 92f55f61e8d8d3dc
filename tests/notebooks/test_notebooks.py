"""Notebooks run from a bare folder, and are committed without outputs."""

import json
import os

import nbclient
import nbformat
import pytest
import transformers
from conftest import ROOT

from opera_jax.text import tokenizer as tokenizer_lib
from scripts.docs import notebooks

NAMES = sorted(path.name for path in notebooks.FOLDER.glob("*.ipynb"))


def _read(name):
  return nbformat.read(notebooks.FOLDER / name, as_version=4)


@pytest.mark.parametrize("name", NAMES)
def test_no_outputs_are_committed(name):
  notebook = _read(name)
  nbformat.validate(notebook)
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert code and not any(cell.outputs for cell in code)
  assert all(cell.execution_count is None for cell in code)


@pytest.mark.parametrize("name", NAMES)
def test_badge_and_installation_are_the_shared_ones(name):
  """After a change: python -m scripts.docs.notebooks."""
  found = {cell.id: cell.source for cell in _read(name).cells}
  for id_, text in notebooks.shared(name).items():
    assert found[id_] == text
  assert f"/blob/main/notebooks/{name}" in found["badge"]


def test_the_address_is_stated_once():
  """Elsewhere it would be forgotten when the project moves."""
  for name in NAMES:
    cells = [c for c in _read(name).cells if c.id not in ("badge", "install")]
    owner = notebooks.REPOSITORY.removeprefix("https://github.com/")
    assert not [c.id for c in cells if owner in c.source]


def _execute(name, monkeypatch, **env):
  notebook = _read(name)
  for variable, value in env.items():
    monkeypatch.setenv(variable, str(value))
  monkeypatch.setenv("XLA_FLAGS", "")  # one device, as for a reader
  monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
  client = nbclient.NotebookClient(
    notebook,
    timeout=1700,
    kernel_name="python3",
    resources={"metadata": {"path": str(notebooks.FOLDER)}},
  )
  client.execute(cwd=str(notebooks.FOLDER), env=dict(os.environ))
  return notebook


def _outputs(notebook, kind):
  return [
    output["data"][kind]
    for cell in notebook.cells
    if cell.cell_type == "code"
    for output in cell.outputs
    if kind in output.get("data", {})
  ]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two minutes on two free cores
def test_one_prompt_runs(tmp_path, monkeypatch):
  """Its own assertions hold the reward by hand to the library's."""
  notebook = _execute(
    "01_one_prompt.ipynb", monkeypatch, OPERA_WORKDIR=tmp_path / "run"
  )
  assert len(_outputs(notebook, "image/png")) == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_ablation_runs(tmp_path, monkeypatch):
  notebook = _execute(
    "02_ablation.ipynb",
    monkeypatch,
    OPERA_WORKDIR=tmp_path / "grid",
    OPERA_SIZE="smoke",
    OPERA_SEEDS=1,
    OPERA_TOKENS=1_000,
  )
  assert len(_outputs(notebook, "image/png")) == 1  # the last drawing stays
  (text,) = _outputs(notebook, "text/markdown")
  for word in ("| opera | 1 |", "| opera, R_self only | 1 |", "| reward |"):
    assert word in text
  kept = json.loads((tmp_path / "grid" / "ablation.json").read_text())
  assert set(kept["values"]) == {"sft", "opera", "opera, R_self only"}


@pytest.fixture
def checkpoint(tmp_path):
  """A random Llama of two layers with a tokenizer and a chat template."""
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=640,
      hidden_size=64,
      intermediate_size=128,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      max_position_embeddings=512,
    )
  )
  folder = tmp_path / "model"
  tokenizer = tokenizer_lib.Tokenizer.train_bpe(
    ["Explain tea to a curious child. Let us look at tea together."] * 9, 400
  )
  model.save_pretrained(folder)
  tokenizer.save(folder)
  return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_your_own_reward_and_data_run(tmp_path, monkeypatch, checkpoint):
  written = ROOT / "my_reward.py"
  try:
    notebook = _execute(
      "03_your_own.ipynb",
      monkeypatch,
      OPERA_WORKDIR=tmp_path / "run",
      OPERA_CHECKPOINT=checkpoint,
      OPERA_STEPS=2,
      OPERA_NEW_TOKENS=32,
    )
  finally:
    written.unlink(missing_ok=True)
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert len(code) == 10
  assert len(_outputs(notebook, "image/png")) == 1  # the curves
  rows = [text for text in _outputs(notebook, "text/plain") if "reward" in text]
  assert "my_reward:concise" in rows[-1]
  assert "reward of the run" in (tmp_path / "run" / "report.html").read_text()
  assert (tmp_path / "run" / "export" / "model.safetensors").exists()
