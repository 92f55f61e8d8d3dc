"""The notebook runs from a bare folder, and is committed without outputs."""

import os

import nbclient
import nbformat
import pytest
from conftest import ROOT

PATH = ROOT / "notebooks" / "01_one_prompt.ipynb"


def test_no_outputs_are_committed():
  notebook = nbformat.read(PATH, as_version=4)
  nbformat.validate(notebook)
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert code and not any(cell.outputs for cell in code)
  assert all(cell.execution_count is None for cell in code)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two minutes on two free cores
def test_the_notebook_runs(tmp_path, monkeypatch):
  """Its own assertions hold the reward by hand to the library's."""
  notebook = nbformat.read(PATH, as_version=4)
  monkeypatch.setenv("OPERA_WORKDIR", str(tmp_path / "run"))
  monkeypatch.setenv("XLA_FLAGS", "")  # one device, as for a reader
  monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
  client = nbclient.NotebookClient(
    notebook,
    timeout=1700,
    kernel_name="python3",
    resources={"metadata": {"path": str(PATH.parent)}},
  )
  client.execute(cwd=str(PATH.parent), env=dict(os.environ))
  pictures = [
    output
    for cell in notebook.cells
    if cell.cell_type == "code"
    for output in cell.outputs
    if "image/png" in output.get("data", {})
  ]
  assert len(pictures) == 4
