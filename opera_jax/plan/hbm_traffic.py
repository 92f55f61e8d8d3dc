"""Counts the bytes that a compiled program moves through HBM, from its HLO.

What the compiler keeps in VMEM or in scalar memory is not counted; arrays have
the size that their tiles give them. Per instruction that stands outside a
fusion, times the runs of its computation:

- a fusion or another operation: its operands and its results;
- an operand that a fusion only slices or gathers from: those slices, read;
- slice, gather: the slice, read and written;
- an update in place (dynamic-update-slice, scatter): the update alone, read and
  written;
- a collective or an asynchronous copy: once, where it starts;
- a Pallas call: its results, and of each operand the share that the caller
  states, all of it where he knows none.

A fusion that reads an operand once may stream it several times where it does
not fit into VMEM, and so may a Pallas call: such bytes are not seen.
"""

import dataclasses
import math
import re
from collections.abc import Callable

from opera_jax.plan import hlo

# (kernel, dims of an operand) -> share of the operand that one call reads; None
# where that is not known.
Reads = Callable[[str, tuple[int, ...]], float | None]
_NOTHING = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"),
  *("conditional", "call", "after-all", "partition-id", "replica-id", "domain"),
  *("opt-barrier", "add-dependency"),
}
_CONTROL = ("while", "conditional", "call")
_NO_MOVE = ("AllocateBuffer", "ConcatBitcast")
_SLICES = ("slice", "dynamic-slice", "gather")
_IN_PLACE = ("dynamic-update-slice", "scatter")
# Inside a fusion these hand on the elements that are asked of them.
_SAME_ELEMENTS = ("bitcast", "copy", "convert", "reshape", "transpose")
_CALLS = ("fusion", "call", "custom-call")
_PALLAS = "tpu_custom_call"


@dataclasses.dataclass(frozen=True)
class Moved:
  """HBM traffic of one call of a program, on one device."""

  bytes: float
  read_once: tuple[str, ...]  # Pallas kernels whose operands count once, whole


def count(text: str, reads: Reads = lambda kernel, dims: None) -> Moved:
  """The bytes that a program reads from HBM and writes to it.

  Args:
    text: optimised HLO of one program.
    reads: share that a Pallas call reads of an operand.
  """
  counter = _Counter(hlo.Module(text), reads)
  total = counter.total()
  return Moved(total, tuple(sorted(counter.unknown)))


class _Counter:
  """Counts one module, and collects the kernels that nobody describes."""

  def __init__(self, module: hlo.Module, reads: Reads):
    self._module, self._reads = module, reads
    self.unknown: set[str] = set()

  def total(self) -> float:
    runs = self._module.runs(_CONTROL)
    return sum(
      runs[name] * self._bytes(name, i)
      for name, body in self._module.computations.items()
      if runs[name]
      for i in body.values()
    )

  def _bytes(self, name: str, i: hlo.Instruction) -> float:
    """Bytes of one run of an instruction."""
    opcode = i.opcode
    if opcode in _NOTHING or opcode.endswith("-done"):
      return 0.0
    if opcode in ("async-start", "async-update"):
      return self._asynchronous(name, i)
    if opcode == "fusion":
      return self._fused(name, i.operands, i.called[0], i.arrays)
    if opcode == "custom-call":
      return self._custom_call(name, i)
    if opcode in _SLICES:
      read = i.arrays[0].padded_bytes * self._in_hbm(name, i.operands[0])
      indices = sum(self._size(name, o) for o in i.operands[1:])
      return read + _hbm(i.arrays) + indices
    if opcode in _IN_PLACE:
      update = self._array(name, _update(i))
      if update is None:
        return 0.0
      written = update.padded_bytes * i.arrays[0].in_hbm
      return update.padded_bytes * update.in_hbm + written
    results = i.arrays
    if opcode == "copy-start":
      results = results[:1]
    elif opcode.endswith("-start") and opcode != "all-reduce-start":
      results = hlo.arrays(hlo.elements(i.type_text)[1])
    return sum(self._size(name, o) for o in i.operands) + _hbm(results)

  def _asynchronous(self, name: str, i: hlo.Instruction) -> float:
    """An operation in a computation of its own, where it gets its operands."""
    operands, start = i.operands, i
    if i.opcode == "async-update":
      operands, start = i.operands[1:], self._started(name, i)
    if not operands or not start.called:
      return 0.0
    called = start.called[0]
    return self._fused(name, operands, called, self._module.root(called).arrays)

  def _started(self, name: str, i: hlo.Instruction) -> hlo.Instruction:
    """The start of an asynchronous operation that goes on."""
    body = self._module.computations[name]
    while i.opcode == "async-update":
      i = body[i.operands[0]]
    return i

  def _custom_call(self, name: str, i: hlo.Instruction) -> float:
    target = re.search(r'custom_call_target="([^"]*)"', i.rest)
    if target is not None and target[1] in _NO_MOVE:
      return 0.0
    if target is None or target[1] != _PALLAS:
      return sum(self._size(name, o) for o in i.operands) + _hbm(i.arrays)
    kernel = _kernel(i)
    total = _hbm(i.arrays)
    for operand in i.operands:
      size, array = self._size(name, operand), self._array(name, operand)
      if not size or array is None:
        continue
      share = self._reads(kernel, array.dims)
      if share is None:
        self.unknown.add(kernel)
      total += size * (1.0 if share is None else share)
    return total

  def _fused(
    self,
    name: str,
    operands: list[str],
    called: str,
    results: list[hlo.Array],
  ) -> float:
    """Operands and results of a fused computation, by what it touches."""
    total = 0.0
    for parameter in self._module.parameters(called):
      size = self._size(name, operands[int(parameter.inside)])
      if size:
        total += size * self._share(called, parameter)
    root = self._module.root(called)
    written = [root.name] if root.opcode != "tuple" else root.operands
    if len(written) != len(results):
      return total + _hbm(results)
    return total + sum(
      array.in_hbm * min(array.padded_bytes, self._written(called, value))
      for value, array in zip(written, results, strict=True)
    )

  def _share(self, name: str, value: hlo.Instruction) -> float:
    """Share of a value's elements that a fused computation reads."""
    body = self._module.computations[name]
    if not value.arrays:
      return 1.0
    elements = max(math.prod(value.arrays[0].dims), 1)
    share = 0.0
    for user in body.values():
      for place, operand in enumerate(user.operands):
        if operand != value.name:
          continue
        if user.opcode in _SLICES and place == 0:
          share += math.prod(user.arrays[0].dims) / elements
        elif user.opcode in _IN_PLACE and place == 0:
          # Overwritten in place where it is what the fusion returns.
          share += 0.0 if self._origin(name, value) else 1.0
        elif not user.root and self._hands_on(user, place):
          share += self._share(name, user)
        elif user.opcode in _CALLS and user.called:
          inner = self._module.parameters(user.called[0])
          share += self._share(user.called[0], inner[place])
        else:
          share += 1.0
    return min(share, 1.0)

  def _hands_on(self, i: hlo.Instruction, place: int) -> bool:
    """Whether an instruction's elements are those of its operand `place`."""
    if i.opcode in _SAME_ELEMENTS:
      return True
    if i.opcode not in _CALLS or not i.called:
      return False
    body = self._module.computations[i.called[0]]
    value = self._module.root(i.called[0])
    while value.opcode != "parameter":
      if not value.operands or not self._hands_on(value, 0):
        return False
      value = body[value.operands[0]]
    return int(value.inside) == place

  def _origin(self, name: str, value: hlo.Instruction) -> bool:
    """Whether a value is a parameter, itself or seen with other dims."""
    body = self._module.computations[name]
    while value.opcode == "bitcast":
      value = body[value.operands[0]]
    return value.opcode == "parameter"

  def _written(self, name: str, value: str) -> float:
    """Bytes that a fused computation writes of a value that it returns."""
    i = self._module.computations[name][value]
    while i.opcode == "bitcast":
      i = self._module.computations[name][i.operands[0]]
    if i.opcode in _IN_PLACE:
      target = self._module.computations[name].get(i.operands[0])
      update = self._array(name, _update(i))
      if target and update and self._origin(name, target):
        return update.padded_bytes
    if i.opcode == "fusion" and len(i.arrays) == 1:
      inner = i.called[0]
      return self._written(inner, self._module.root(inner).name)
    return i.arrays[0].padded_bytes if len(i.arrays) == 1 else math.inf

  def _array(self, name: str, operand: str) -> hlo.Array | None:
    """The array that an operand is; None for a tuple."""
    i = self._module.computations[name].get(operand)
    return i.arrays[0] if i is not None and len(i.arrays) == 1 else None

  def _in_hbm(self, name: str, operand: str) -> bool:
    array = self._array(name, operand)
    return array is not None and array.in_hbm

  def _size(self, name: str, operand: str) -> float:
    """Bytes of an operand in HBM, 0 elsewhere."""
    i = self._module.computations[name].get(operand)
    return 0.0 if i is None else _hbm(i.arrays)


def _hbm(arrays: list[hlo.Array]) -> float:
  return sum(array.padded_bytes for array in arrays if array.in_hbm)


def _update(i: hlo.Instruction) -> str:
  """The operand that an update in place writes."""
  if i.opcode == "dynamic-update-slice":
    return i.operands[1]
  return i.operands[-1]  # (targets, indices, updates) of one target


def _kernel(i: hlo.Instruction) -> str:
  """The name that its `pallas_call` gave a kernel."""
  named = re.search(r'op_name="[^"]*?([\w.\-]+)/pallas_call', i.rest)
  return named[1] if named else re.sub(r"\.(\d+|clone|remat)", "", i.name)
