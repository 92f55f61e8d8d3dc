"""A file is there whole or as it was, and no link is followed."""

import errno
import os

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


def test_a_full_disk_is_named_and_leaves_what_was(tmp_path, monkeypatch):
  path = tmp_path / "a.txt"
  atomic_file.write(path, "before")

  def full(handle):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match=r"a\.txt cannot be written \(No space"):
    atomic_file.write(path, "after")
  assert path.read_text() == "before"
  assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
