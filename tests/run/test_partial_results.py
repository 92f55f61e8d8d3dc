"""What a stage has done is not done again, and damage costs that piece."""

import json

import numpy as np
import pytest

from opera_jax import structs
from opera_jax.run import partial_results


def test_a_piece_is_made_once(tmp_path):
  made = []
  piece = [0.1, 1 / 3, float(np.float32(0.7))]

  def make():
    made.append(1)
    return piece

  for _ in range(2):
    assert partial_results.PartialResults(tmp_path).get("a", make) == piece
  assert made == [1]


@pytest.mark.parametrize(
  "damage",
  [b"", b'{"piece": [1', b"[1]", b'{"other": 1}', b"\xff\xfe", b"[" * 100_000],
)
def test_a_damaged_piece_is_made_again_with_a_warning(tmp_path, damage):
  partial_results.PartialResults(tmp_path).get("a", lambda: [1])
  (tmp_path / "a.json").write_bytes(damage)
  with pytest.warns(RuntimeWarning, match="Ignoring .*a.json"):
    assert partial_results.PartialResults(tmp_path).get("a", lambda: [2]) == [2]
  assert partial_results.PartialResults(tmp_path).get("a", lambda: [3]) == [2]


def test_a_link_in_its_place_is_not_followed(tmp_path):
  victim = tmp_path / "victim"
  victim.write_text(json.dumps({"piece": [9]}))
  (tmp_path / "parts").mkdir()
  (tmp_path / "parts" / "a.json").symlink_to(victim)
  with pytest.warns(RuntimeWarning, match="not a regular file"):
    assert partial_results.PartialResults(tmp_path / "parts").get(
      "a", lambda: [2]
    ) == [2]
  assert json.loads(victim.read_text()) == {"piece": [9]}


def test_samples_come_back_bit_for_bit():
  rng = np.random.default_rng(0)
  groups = [
    [
      structs.Sample(
        tokens=rng.integers(0, 99, size).astype(np.int32),
        logprob=rng.normal(size=size).astype(np.float32),
        finished=bool(size % 2),
        reason="stop",
      )
      for size in (3, 0)
    ]
    for _ in range(2)
  ]
  text = json.dumps(partial_results.samples_to_json(groups))
  back = partial_results.samples_from_json(json.loads(text))
  for a, b in zip(groups, back, strict=True):
    for x, y in zip(a, b, strict=True):
      assert x.tokens.tobytes() == y.tokens.tobytes()
      assert x.logprob.tobytes() == y.logprob.tobytes()
      assert (x.finished, x.reason) == (y.finished, y.reason)
      assert (y.tokens.dtype, y.logprob.dtype) == (np.int32, np.float32)


def test_blocks_cover_all_once():
  for count in (0, 1, 64, 65, 200):
    blocks = list(partial_results.blocks(count))
    assert [i for block in blocks for i in block] == list(range(count))
    most = partial_results.PROMPTS_PER_BLOCK
    assert all(0 < len(block) <= most for block in blocks)
