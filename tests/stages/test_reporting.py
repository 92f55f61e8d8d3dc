"""A damaged file costs the page its histograms, and not the page."""

import gzip
import json
import types

import pytest

from opera_jax.configs import tiny
from opera_jax.models import decoder
from opera_jax.stages import reporting
from opera_jax.train import checkpoint

RECORD = {
  "step": 1,
  "task": "open_ended",
  "terms": {"count": 1.0},
  "reward": 0.5,
  "advantage": None,
  "completion_tokens": 3,
}


@pytest.fixture
def run(tmp_path):
  """A run of two RL steps, as far as the page asks for it."""
  folder = tmp_path / "rl" / "rollouts"
  folder.mkdir(parents=True)
  for step in (1, 2):
    lines = [
      json.dumps({**RECORD, "step": step, "reward": step + n / 4}) + "\n"
      for n in range(4)
    ]
    path = folder / f"step_{step:08d}.jsonl.gz"
    path.write_bytes(gzip.compress("".join(lines).encode()))
  return types.SimpleNamespace(
    workdir=tmp_path,
    model=decoder.Config(
      vocab_size=64,
      hidden_size=8,
      num_hidden_layers=1,
      num_attention_heads=2,
      num_key_value_heads=1,
      head_dim=4,
      intermediate_size=8,
    ),
    tokenizer=types.SimpleNamespace(vocab_size=64),
    tasks=types.SimpleNamespace(synthesis=(), rl=(), notes=()),
    dropped={},
  )


def _page(run) -> str:
  reporting.write(
    run, tiny.get_config("smoke").to_dict(), checkpoint.Preemption()
  )
  return (run.workdir / "report.html").read_text()


@pytest.mark.parametrize(
  "content",
  [
    b"no gzip",
    gzip.compress(b"{}\n" * 99, mtime=0)[:-9],
    gzip.compress(b"[" * 100_000, mtime=0),
    gzip.compress(b'{"a": 1}\n', mtime=0),
    *(
      gzip.compress(json.dumps({**RECORD, name: value}).encode(), mtime=0)
      for name, value in (
        ("step", "1"),
        ("terms", [1]),
        ("terms", {"count": "<b>"}),
        ("facts", 3),
        ("reward", {}),
      )
    ),
  ],
  ids=lambda content: content[:8].hex(),
)
def test_a_damaged_file_of_rollouts_does_not_cost_the_page(
  run, capsys, content
):
  whole = _page(run)
  assert "step 2" in whole and not capsys.readouterr().out.count("warning")
  damaged = run.workdir / "rl" / "rollouts" / "step_00000001.jsonl.gz"
  damaged.write_bytes(content)
  page = _page(run)
  said = capsys.readouterr().out
  assert f"warning: its histograms lack a file: {damaged}:1:" in said
  assert "step 2" in page and len(page) < len(whole)


def test_a_folder_in_place_of_rollouts_does_not_cost_the_page(run, capsys):
  path = run.workdir / "rl" / "rollouts" / "step_00000001.jsonl.gz"
  path.unlink()
  path.mkdir()
  assert "step 2" in _page(run) and "Is a directory" in capsys.readouterr().out
