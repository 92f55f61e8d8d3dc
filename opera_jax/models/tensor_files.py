"""Safetensors on disk: rows of one tensor in, one tensor at a time out.

The format is eight bytes of length, a JSON header, then the tensors' bytes.
Plain reads, not a memory map, keep what the process holds down to the rows
asked for; the writer lays the header out from shapes alone, so that it never
holds more than the tensor at hand.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
}
_HEADER_BYTES = 100 * 2**20  # at most, as the safetensors library has it
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies."""

  file: pathlib.Path
  dtype: str  # as the header spells it, e.g. BF16
  shape: tuple[int, ...]
  offset: int  # bytes from the start of the file

  def bytes(self) -> int:
    """Of the whole tensor; 0 for a type that is not read."""
    if not readable(self.dtype):
      return 0
    return math.prod(self.shape) * _DTYPES[self.dtype].itemsize

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Entries [start, stop) of the first axis, [stop - start, ...].

    Raises:
      ValueError: a type other than F32, F16 and BF16.
    """
    if self.dtype not in _DTYPES:
      raise ValueError(
        f"{self.file} stores {self.dtype}; weights are read from "
        f"{', '.join(_DTYPES)}. Convert the checkpoint first."
      )
    dtype = _DTYPES[self.dtype]
    rest = self.shape[1:]
    width = math.prod(rest)
    flat = np.fromfile(
      self.file,
      dtype,
      count=(stop - start) * width,
      offset=self.offset + start * width * dtype.itemsize,
    )
    return flat.reshape(stop - start, *rest)


def readable(dtype: str) -> bool:
  """Whether `Tensor.rows` reads that type."""
  return dtype in _DTYPES


def find(folder: pathlib.Path) -> dict[str, Tensor]:
  """Every tensor of a checkpoint folder, by name; reads headers only.

  Args:
    folder: holds model.safetensors, or model.safetensors.index.json and the
      files that it names.

  Raises:
    FileNotFoundError: neither is there, or a file that the index names.
    ValueError: a file shorter than its header says (a broken download), a
      header or an index that is none, a tensor in two places.
  """
  if (folder / SINGLE).exists():
    names = [SINGLE]
  elif (folder / INDEX).exists():
    names = _indexed(folder / INDEX)
  else:
    raise FileNotFoundError(
      f"{folder} holds neither {SINGLE} nor {INDEX}. Name the directory of a "
      "Hugging Face model in safetensors format."
    )
  missing = [name for name in names if not (folder / name).exists()]
  if missing:
    raise FileNotFoundError(
      f"{folder / INDEX} names {', '.join(missing)}, which are not there. "
      "Download the checkpoint again."
    )
  tensors: dict[str, Any] = {}
  for name in names:
    found = _header(folder / name)
    twice = sorted(found.keys() & tensors.keys())
    if twice:
      raise ValueError(
        f"{folder / name} holds {twice[0]}, and so does "
        f"{tensors[twice[0]].file}. Download the checkpoint again."
      )
    tensors |= found
  return tensors


def _indexed(file: pathlib.Path) -> list[str]:
  """The files that an index names, all of them beside it."""
  try:
    table = json.loads(file.read_text("utf-8"))["weight_map"]
    names = sorted(set(table.values()))
    inside = [n == pathlib.PurePath(n).name and n != ".." for n in names]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{file} is no index of safetensors ({type(error).__name__}: {error}). "
      "Download it again."
    ) from error
  if not names or not all(inside):
    raise ValueError(
      f"{file} names {names[:3]}; an index names files of its own folder, and "
      "nothing outside of it. Do not load this checkpoint."
    )
  return names


def _header(file: pathlib.Path) -> dict[str, Tensor]:
  size = file.stat().st_size
  with open(file, "rb") as stream:
    length = int.from_bytes(stream.read(8), "little")
    text = stream.read(length) if length < min(size, _HEADER_BYTES) else b""
  if len(text) < length or size < 8:
    raise ValueError(
      f"{file} has {size} bytes, and its header should have {length} (at most "
      f"{_HEADER_BYTES}). Download it again."
    )
  try:
    entries = json.loads(text)
    entries.pop("__metadata__", None)
    tensors = {
      name: _tensor(file, name, entry, 8 + length, size)
      for name, entry in entries.items()
    }
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{file} has a header that cannot be read ({type(error).__name__}: "
      f"{error}). Download it again."
    ) from error
  spans = sorted(
    (t.offset, t.offset + t.bytes(), n) for n, t in tensors.items()
  )
  for (_, end, before), (begin, _, name) in zip(spans, spans[1:]):
    if begin < end:
      raise ValueError(
        f"{file}: the bytes of {name} overlap those of {before}. Download it "
        "again."
      )
  return tensors


def _tensor(
  file: pathlib.Path, name: str, entry: dict[str, Any], start: int, size: int
) -> Tensor:
  """One entry of a header, whose bytes lie in the file and fit its shape."""
  begin, end = entry["data_offsets"]
  shape = tuple(entry["shape"])
  whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
  if not whole or not isinstance(entry["dtype"], str):
    raise ValueError(f"{name} is described as {str(entry)[:200]}")
  if start + end > size:
    raise ValueError(
      f"the file has {size} bytes, but {name} ends at byte {start + end}"
    )
  tensor = Tensor(file, entry["dtype"], shape, start + begin)
  if readable(tensor.dtype) and end - begin != tensor.bytes():
    raise ValueError(
      f"{name} takes {end - begin} bytes, and {tensor.dtype}{list(shape)} has "
      f"{tensor.bytes()}"
    )
  return tensor


class Writer:
  """Writes a checkpoint folder tensor by tensor, in a given order."""

  def __init__(
    self,
    folder: pathlib.Path,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    dtype: np.dtype,
    file_bytes: int,
  ):
    """Plans the files; nothing is written yet.

    Args:
      folder: an existing directory.
      tensors: name and shape of each, in the order in which they will come.
      dtype: of all of them: float32, float16 or bfloat16.
      file_bytes: a further file is begun before one would pass this.

    Raises:
      FileExistsError: the folder holds safetensors already.
      ValueError: another dtype.
    """
    old = sorted(file.name for file in folder.glob("*.safetensors*"))
    if old:
      raise FileExistsError(
        f"{folder} holds {', '.join(old)} already, and a mixture of two "
        "checkpoints would load. Delete them, or name another directory."
      )
    if np.dtype(dtype) not in _NAMES:
      raise ValueError(
        f"Weights are written as {', '.join(map(str, _NAMES))}, got {dtype}."
      )
    self._folder = folder
    self._dtype = np.dtype(dtype)
    self._parts: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    held = 0
    for name, shape in tensors:
      size = math.prod(shape) * self._dtype.itemsize
      if self._parts[-1] and held + size > file_bytes:
        self._parts.append([])
        held = 0
      self._parts[-1].append((name, shape))
      held += size

  def write(self, arrays: Iterable[np.ndarray]) -> None:
    """Writes the arrays, which come in the order planned.

    Raises:
      ValueError: a shape other than planned.
    """
    arrays = iter(arrays)
    count = len(self._parts)
    table, total = {}, 0
    for number, part in enumerate(self._parts, start=1):
      file = f"model-{number:05d}-of-{count:05d}.safetensors"
      file = SINGLE if count == 1 else file
      with open(self._folder / file, "wb") as stream:
        stream.write(self._header(part))
        for name, shape in part:
          array = np.ascontiguousarray(next(arrays), self._dtype)
          if array.shape != shape:
            raise ValueError(f"{name}: {array.shape} came, {shape} planned.")
          stream.write(array.reshape(-1).view(np.uint8).data)
          table[name] = file
          total += array.nbytes
    if count > 1:
      index = {"metadata": {"total_size": total}, "weight_map": table}
      (self._folder / INDEX).write_text(json.dumps(index, indent=2), "utf-8")

  def _header(self, part: Sequence[tuple[str, tuple[int, ...]]]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in part:
      size = math.prod(shape) * self._dtype.itemsize
      header[name] = {
        "dtype": _NAMES[self._dtype],
        "shape": list(shape),
        "data_offsets": [at, at + size],
      }
      at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
