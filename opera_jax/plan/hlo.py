"""Reads the HLO text of a compiled program: instructions, how many times each
computation runs, and what its collectives send.

A scanned body appears once and runs many times, so each computation is
multiplied by the trip counts of the `while` loops around it. A loop that may
end early counts with its bound. An asynchronous collective appears several
times (start, overlapped work, done) and is counted at its start.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8": 1,
          "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4,
          "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_START = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
  r"\b(?:calls|to_apply|called_computations|branch_computations|"
  r"true_computation|false_computation|condition|body)="
  r"(\{[^}]*\}|%?[\w.\-]+)"
)
_SHAPE = re.compile(r"\b([a-z]+\d*)(?:e\dm\d\w*)?\[([\d,]*)\](?:\{([^}]*)\})?")
_KNOWN = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_DIRECTIONS = ("LT", "LE", "GT", "GE", "NE")
# What passes a loop's counter on unchanged.
_SAME_VALUE = ("bitcast", "copy", "convert", "reshape")


@dataclasses.dataclass(frozen=True)
class Array:
  """Type of one array of HLO, with the layout that the compiler gave it."""

  dtype: str
  dims: tuple[int, ...]
  layout: str  # what stands in braces; "" without

  @property
  def bytes(self) -> float:
    """Bytes of its elements alone."""
    return _BYTES.get(self.dtype, 0) * math.prod(self.dims)

  @property
  def padded_bytes(self) -> float:
    """Bytes in memory: minor axes are rounded up to whole tiles."""
    order = re.match(r"[\d,]*", self.layout)
    tile = re.search(r"T\(([\d,]+)\)", self.layout)
    if tile is None or order is None:
      return self.bytes
    minor_first = [self.dims[int(i)] for i in order[0].split(",") if i]
    sides = [int(side) for side in tile[1].split(",")][::-1]
    minor_first += [1] * (len(sides) - len(minor_first))
    for i, side in enumerate(sides):
      minor_first[i] = -(-minor_first[i] // side) * side
    return _BYTES.get(self.dtype, 0) * math.prod(minor_first)

  @property
  def in_hbm(self) -> bool:
    """Whether it lies in HBM, not in the memory space of VMEM or scalars."""
    space = re.search(r"S\((\d+)\)", self.layout)
    return space is None or space[1] == "0"


def arrays(type_text: str) -> list[Array]:
  """The arrays of a type, those of a tuple one after the other."""
  return [
    Array(dtype, tuple(int(d) for d in dims.split(",") if d), layout)
    for dtype, dims, layout in _SHAPE.findall(type_text)
  ]


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of a computation."""

  name: str
  type_text: str
  opcode: str
  inside: str  # what stands in its brackets
  rest: str  # attributes after them
  root: bool

  @functools.cached_property
  def operands(self) -> list[str]:
    """Names of its operands."""
    return _NAME.findall(self.inside)

  @functools.cached_property
  def arrays(self) -> list[Array]:
    """The arrays of its result."""
    return arrays(self.type_text)

  @functools.cached_property
  def called(self) -> list[str]:
    """Names of the computations that it calls."""
    return [
      name
      for group in _CALLED.findall(self.rest)
      for name in re.findall(r"[\w.\-]+", group)
    ]

  def attribute(self, name: str) -> str:
    """A computation named by an attribute such as `body`; "" without it."""
    found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
    return found[1] if found else ""


class Module:
  """The computations of one optimised HLO module."""

  def __init__(self, text: str):
    """Parses the text.

    Args:
      text: optimised HLO of one program.

    Raises:
      ValueError: the text has no entry computation.
    """
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.entry, current = "", None
    for line in text.splitlines():
      head = _HEAD.match(line)
      if head is not None:
        current = self.computations.setdefault(head[2], {})
        self.entry = head[2] if head[1] else self.entry
      elif current is not None:
        instruction = _instruction(line)
        if instruction is not None:
          current[instruction.name] = instruction
    if not self.entry:
      raise ValueError(
        "The HLO text has no ENTRY computation; pass a whole optimised module."
      )

  def root(self, computation: str) -> Instruction:
    """The instruction whose value a computation returns."""
    body = self.computations[computation].values()
    return next((i for i in body if i.root), list(body)[-1])

  def parameters(self, computation: str) -> list[Instruction]:
    """The parameters of a computation, in order."""
    found = [
      i
      for i in self.computations[computation].values()
      if i.opcode == "parameter"
    ]
    return sorted(found, key=lambda i: int(i.inside))

  def runs(self, callers: tuple[str, ...] | None = None) -> dict[str, int]:
    """How many times each computation runs per run of the entry.

    Args:
      callers: opcodes whose computations count, such as "while"; None for all.
        What ends or goes on with an asynchronous operation does not call again.
    """
    runs = dict.fromkeys(self.computations, 0)

    def visit(name: str, times: int) -> None:
      runs[name] += times
      for instruction in self.computations[name].values():
        opcode = instruction.opcode
        if callers is not None and opcode not in callers:
          continue
        if opcode.endswith(("-done", "-update")):
          continue
        trips = self.trips(name, instruction) if opcode == "while" else 1
        for callee in instruction.called:
          if callee not in self.computations:
            continue
          # The condition is asked once more, when the loop ends.
          ends = opcode == "while" and (
            callee == instruction.attribute("condition")
          )
          visit(callee, times * (trips + 1 if ends else trips))

    visit(self.entry, 1)
    return runs

  def trips(self, computation: str, loop: Instruction) -> int:
    """Trip count of a `while`.

    The compiler's own count if it states one. Otherwise the condition compares
    a counter, an element of the loop's tuple to which the body adds a constant,
    with a bound: (bound - start) / step, whatever the integers' type and the
    direction. With several such comparisons the loop ends at the first.

    A condition without one is bounded by its largest integer constant.

    Args:
      computation: in which the loop stands.
      loop: the instruction.
    """
    known = _KNOWN.search(loop.rest)
    if known is not None:
      return int(known[1])
    condition = loop.attribute("condition")
    if condition not in self.computations:
      return 1
    counts = [
      count
      for compare, values in self._comparisons(condition, {})
      if (count := self._count(computation, loop, compare, values)) is not None
    ]
    if counts:
      return min(counts)
    bounds = [
      int(i.inside)
      for i in self.computations[condition].values()
      if i.opcode == "constant" and re.fullmatch(r"\d+", i.inside)
    ]
    return max(bounds, default=1)

  def _comparisons(
    self, computation: str, given: dict[int, tuple[str, int] | None]
  ) -> Iterator[tuple[str, list[tuple[str, int] | None]]]:
    """(direction, both values) of a condition's comparisons, fused or not."""
    for i in self.computations[computation].values():
      if i.opcode == "compare":
        direction = re.search(r"direction=(\w\w)", i.rest)
        values = [self._value(computation, o, given) for o in i.operands]
        if direction is not None and len(values) == 2:
          yield direction[1], values
      elif i.opcode in ("fusion", "call"):
        inner = {
          n: self._value(computation, o, given)
          for n, o in enumerate(i.operands)
        }
        for callee in i.called:
          if callee in self.computations:
            yield from self._comparisons(callee, inner)

  def _value(
    self,
    computation: str,
    name: str,
    given: dict[int, tuple[str, int] | None],
  ) -> tuple[str, int] | None:
    """("constant", its value) or ("element", index in the loop's tuple)."""
    i = self.computations[computation].get(name)
    while i is not None and i.opcode in _SAME_VALUE and i.operands:
      i = self.computations[computation].get(i.operands[0])
    if i is None:
      return None
    if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.inside):
      return "constant", int(i.inside)
    if i.opcode == "get-tuple-element":
      source = self.computations[computation].get(i.operands[0])
      index = re.search(r"index=(\d+)", i.rest)
      if source is not None and source.opcode == "parameter" and index:
        return "element", int(index[1])
    if i.opcode == "parameter" and re.fullmatch(r"\d+", i.inside):
      return given.get(int(i.inside))
    return None

  def _count(
    self,
    computation: str,
    loop: Instruction,
    direction: str,
    values: list[tuple[str, int] | None],
  ) -> int | None:
    """Trips until a comparison fails; None if it bounds nothing."""
    if values[0] is None or values[1] is None or direction not in _DIRECTIONS:
      return None
    body = loop.attribute("body")
    left = self._start(computation, loop, body, values[0])
    right = self._start(computation, loop, body, values[1])
    if left is None or right is None:
      return None
    (start, step), (bound, other) = left, right
    if step == 0:  # the counter stands on the right
      (start, step), (bound, other) = (bound, other), (start, step)
    if other != 0 or step == 0:
      return None
    distance = (bound - start) / step
    if direction in ("LT", "GT"):
      return max(math.ceil(distance), 0)
    if direction in ("LE", "GE"):
      return max(math.floor(distance) + 1, 0)
    return max(int(distance), 0)

  def _start(
    self,
    computation: str,
    loop: Instruction,
    body: str,
    value: tuple[str, int],
  ) -> tuple[int, int] | None:
    """(first value, step) of one side of a comparison; step 0 if constant."""
    kind, number = value
    if kind == "constant":
      return number, 0
    result = self.root(body)
    if result.opcode != "tuple" or number >= len(result.operands):
      return None
    step = self._step(body, result.operands[number], number)
    tuple_ = self.computations[computation].get(loop.operands[0])
    first = None
    if tuple_ is not None and tuple_.opcode == "tuple":
      first = self._value(computation, tuple_.operands[number], {})
    if step is None or (step == 0 and first is None):
      return None
    known = first is not None and first[0] == "constant"
    return (first[1] if known and first else 0), step

  def _step(self, body: str, name: str, element: int) -> int | None:
    """What a loop's body adds to an element of its tuple; None if unknown."""
    if self._value(body, name, {}) == ("element", element):
      return 0
    i = self.computations[body].get(name)
    while i is not None and i.opcode in _SAME_VALUE and i.operands:
      i = self.computations[body].get(i.operands[0])
    if i is None:
      return None
    operands = [self._value(body, o, {}) for o in i.operands]
    if i.opcode == "fusion" and len(i.called) == 1:
      given = dict(enumerate(operands))
      callee = i.called[0]
      i = self.root(callee)
      operands = [self._value(callee, o, given) for o in i.operands]
    if i.opcode not in ("add", "subtract") or len(operands) != 2:
      return None
    if i.opcode == "add" and operands[1] == ("element", element):
      operands.reverse()
    if operands[0] != ("element", element) or operands[1] is None:
      return None
    if operands[1][0] != "constant":
      return None
    return operands[1][1] * (1 if i.opcode == "add" else -1)


def _instruction(line: str) -> Instruction | None:
  """One line of HLO; None if it holds no instruction."""
  start = _START.match(line)
  if start is None:
    return None
  at = start.end()
  end = _closing(line, at) if line[at : at + 1] == "(" else line.find(" ", at)
  opcode = _OPCODE.match(line, end)
  if end < 0 or opcode is None:
    return None
  close = _closing(line, opcode.end() - 1)
  return Instruction(
    name=start[2],
    type_text=line[at:end],
    opcode=opcode[1],
    inside=line[opcode.end() : close - 1],
    rest=line[close:],
    root=bool(start[1]),
  )


def _closing(line: str, at: int) -> int:
  """Where the bracket that opens at `at` has closed."""
  depth = 0
  for match in re.compile(r"[()]").finditer(line, at):
    depth += 1 if match[0] == "(" else -1
    if depth == 0:
      return match.end()
  return len(line)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program."""

  kind: str
  sent: float  # bytes that a device sends in all its runs
  group: tuple[int, ...]  # devices of the first group, places in the mesh


def collectives(text: str) -> list[Collective]:
  """What a device sends in a program's collectives.

  With groups of n devices and a full array of b bytes (after gathering, or
  before scattering): all-gather, reduce-scatter and all-to-all send b (n - 1) /
  n, all-reduce twice that, collective-permute b.

  Args:
    text: optimised HLO of one program.
  """
  module = Module(text)
  runs = module.runs()
  out = []
  for name, body in module.computations.items():
    if not runs[name] or _started_elsewhere(name, body):
      continue
    for i in body.values():
      kind = i.opcode.removesuffix("-start")
      if kind not in KINDS:
        continue
      size, group = _full_bytes(i, kind), _group(i.rest)
      n = len(group)
      if kind == "reduce-scatter":
        size *= n
      # A TPU implements reduce-scatter as all-reduce and slice in one fusion.
      if name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
      sent = runs[name] * size * _sent_fraction(kind, n)
      out.append(Collective(kind, sent, group))
  return out


def collective_bytes(text: str) -> dict[str, float]:
  """Bytes that a device sends, per kind of collective; see `collectives`."""
  total: dict[str, float] = collections.defaultdict(float)
  for collective in collectives(text):
    total[collective.kind] += collective.sent
  return dict(total)


def _started_elsewhere(name: str, body: dict[str, Instruction]) -> bool:
  """Whether the collectives in this computation were started elsewhere."""
  return name.startswith("async_collective_fusion") or any(
    '"AsyncCollectiveDone"' in i.rest for i in body.values()
  )


def _sent_fraction(kind: str, n: int) -> float:
  """Bytes that each of n devices sends per byte of the full array."""
  if kind == "collective-permute":
    return 1.0
  return (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _full_bytes(i: Instruction, kind: str) -> float:
  """Bytes of a collective's result, one array or several.

  A started all-gather or permutation gives (operands, results, counters), a
  started all-reduce its results.
  """
  text = i.type_text
  if i.opcode.endswith("-start") and kind != "all-reduce":
    text = elements(text)[1]
  return sum(array.bytes for array in arrays(text))


def elements(type_text: str) -> list[str]:
  """Types of the elements of a tuple."""
  out, depth, at = [], 0, 1
  for match in re.compile(r"[(){}\[\],]").finditer(type_text, 1):
    if match[0] in "({[":
      depth += 1
    elif match[0] in ")}]":
      depth -= 1
    if (match[0] == "," and depth == 0) or depth < 0:
      out.append(type_text[at : match.start()])
      at = match.end()
  return out


def _group(rest: str) -> tuple[int, ...]:
  """Devices of the first group of a collective."""
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
  if mesh is not None:
    return _mesh_group(mesh[1], mesh[2])
  iota = re.search(
    r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest
  )
  if iota is not None:
    ids = np.arange(math.prod(_numbers(iota[2]))).reshape(_numbers(iota[2]))
    if iota[3]:
      ids = ids.transpose(_numbers(iota[3]))
    return tuple(ids.reshape(-1, int(iota[1]))[0].tolist())
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
  if listed is not None:
    return tuple(_numbers(listed[1]))
  pairs = re.search(r"source_target_pairs=\{([^=]*)\}\}", rest)
  if pairs is not None:
    for pair in re.findall(r"(\d+,\d+)", pairs[1]):
      source, target = _numbers(pair)
      if source != target:
        return source, target
  return (0,)


def _mesh_group(axes: str, joined: str) -> tuple[int, ...]:
  """First group over the axes `joined` of a mesh; 'a':(2)4 is a part of a."""
  sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
  dims: list[int] = []
  place = {}
  parts = {
    name: (int(outer), int(size))
    for name, outer, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", joined)
  }
  for name, size in sizes.items():
    outer, inner = parts.get(name, (1, size))
    place[name] = len(dims) + 1
    dims += [outer, inner, size // (outer * inner)]
  taken = [place[name] for name in re.findall(r"'([^']+)'", joined)]
  others = [axis for axis in range(len(dims)) if axis not in taken]
  ids = np.arange(math.prod(dims)).reshape(dims).transpose([*others, *taken])
  n = math.prod(dims[axis] for axis in taken)
  return tuple(ids.reshape(-1, n)[0].tolist())


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(",")]
