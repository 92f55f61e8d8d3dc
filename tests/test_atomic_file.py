"""A file is there whole or as it was, and no link is followed."""

import pytest

from opera_jax import atomic_file


def test_it_appears_whole_or_stays_as_it_was(tmp_path):
  path = tmp_path / "a.txt"
  atomic_file.write(path, "é")
  assert path.read_bytes() == "é".encode()
  with pytest.raises(ZeroDivisionError), atomic_file.replacing(path) as file:
    file.write("half")
    file.flush()
    assert path.read_text() == "é"
    raise ZeroDivisionError
  assert path.read_text() == "é"
  with atomic_file.replacing(path, "wb") as file:
    file.write(b"\x00")
  assert path.read_bytes() == b"\x00"
  assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_no_link_is_followed(tmp_path):
  victim = tmp_path / "victim"
  victim.write_text("precious")
  path = tmp_path / "report.html"
  for link in (path, tmp_path / "report.html.tmp", tmp_path / "report.tmp"):
    link.symlink_to(victim)
  atomic_file.write(path, "page")
  assert victim.read_text() == "precious"
  assert path.read_text() == "page" and not path.is_symlink()
