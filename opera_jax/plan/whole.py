"""Plans a run on a topology: all programs, and a lower bound of a step's
time."""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from opera_jax.models import decoder
from opera_jax.plan import analyse, estimate, hardware, memory_floor, programs
from opera_jax.sharding import mesh as mesh_lib

SECTIONS = ("model", "engine", "rollout", "scoring", "sft", "rl")
Sections = Mapping[str, Mapping[str, Any]]


def make(
  topology: str,
  mesh: Mapping[str, int],
  sections: Sections,
  *,
  name: str,
  names: tuple[str, ...] = programs.NAMES,
  before: Mapping[str, Any] | None = None,
  save: Callable[[dict[str, Any]], None] = lambda plan: None,
) -> dict[str, Any]:
  """Finds the costs of a run's programs and sums them.

  A TPU's programs are compiled, those of a GPU or CPU estimated. Compiling
  turns JAX's compilation cache off: programs for absent hardware can be written
  to it, but not read.

  Args:
    topology: see `hardware.card` and `hardware.parse`.
    mesh: see `sharding.mesh.create`.
    sections: config sections by the names in SECTIONS.
    name: of the config.
    names: the programs to plan, of `programs.NAMES`.
    before: an earlier plan of the same config and topology; its other programs
      are kept.
    save: called with the plan after each program. Until the last one it has
      the key "missing", with the names of the programs that it lacks.

  Returns:
    The plan, which JSON and `render` can write.

  Raises:
    ValueError: an unknown topology or program, sizes that do not divide.
  """
  card = hardware.card(topology)
  costs = kept(before, name, topology)
  found: Iterator[analyse.Cost]
  if card is None:
    laid_out, found = _compiled(topology, mesh, sections, names)
    chip, count = hardware.parse(topology)
    about = {
      "devices": count,
      "chips": count // chip.devices,
      "hbm_bytes": chip.hbm_bytes,
      "peak_flops": chip.flops * count,
      "versions": _versions("jax", "libtpu"),
    }
  else:
    laid_out = estimate.one_device(mesh)
    found = estimate.costs(card, mesh, sections, names)
    about = {
      "devices": 1,
      "chips": 1,
      "hbm_bytes": card.memory_bytes,
      "peak_flops": card.flops(sections["model"]["dtype"]),
      "versions": "estimated from shapes, nothing compiled",
    }
  head: dict[str, Any] = {"config": name, "topology": topology, **about}
  head["mesh"] = dict(laid_out.shape)
  for cost in found:
    costs[cost.name] = dataclasses.asdict(cost)
    size = f"{cost.total_bytes / hardware.GIB:.2f} GiB"
    fits = "fits" if cost.fits else "does not fit"
    print(f"plan: {cost.name} ({cost.shape}): {size}, {fits}", flush=True)
    missing = [n for n in names if n not in costs]
    save(_plan(head, costs, sections, laid_out) | {"missing": missing})
  plan = _plan(head, costs, sections, laid_out)
  save(plan)
  return plan


def _compiled(
  topology: str,
  mesh: Mapping[str, int],
  sections: Sections,
  names: tuple[str, ...],
) -> tuple[jax.sharding.Mesh, Iterator[analyse.Cost]]:
  """The mesh of a TPU slice, and the costs of programs compiled for it."""
  chip, _ = hardware.parse(topology)
  jax.config.update("jax_enable_compilation_cache", False)
  laid_out = mesh_lib.create(dict(mesh), hardware.devices(topology))

  def costs() -> Iterator[analyse.Cost]:
    for program in programs.build(laid_out, **sections, names=names):
      print(f"plan: compiling {program.name} ({program.shape})", flush=True)
      yield analyse.analyse(program, laid_out, chip)

  return laid_out, costs()


def _plan(
  head: Mapping[str, Any],
  costs: Mapping[str, Mapping[str, Any]],
  sections: Sections,
  laid_out: jax.sharding.Mesh,
) -> dict[str, Any]:
  ordered = [costs[n] for n in programs.NAMES if n in costs]
  floor, serial = (
    {c["name"]: c["work"] * c[seconds] for c in ordered
     if c["calls"] and c[seconds] is not None}
    for seconds in ("seconds", "serial_seconds")
  )  # fmt: skip
  model, rl = decoder.Config(**sections["model"]), sections["rl"]
  return {
    **head,
    "parameters": decoder.parameter_count(decoder.abstract(model)[1]),
    "slot_bytes": memory_floor.token_bytes(
      model, sections["engine"]["cache_dtype"]
    )
    * sections["rollout"]["max_new_tokens"],
    "most_programs": programs.most(
      laid_out,
      **{part: sections[part] for part in ("model", "engine", "scoring", "rl")},
    ),
    "step_tokens": rl["prompts"] * rl["samples"] * max(rl["row_buckets"]),
    "step_seconds": sum(floor.values()),
    "step_parts": floor,
    "serial_seconds": sum(serial.values()),
    "serial_parts": serial,
    "programs": ordered,
  }


def _versions(*packages: str) -> str:
  return ", ".join(
    f"{package} {importlib.metadata.version(package)}" for package in packages
  )


def kept(
  before: Mapping[str, Any] | None, name: str, topology: str
) -> dict[str, Any]:
  """Costs by program of an earlier plan with the same config and topology.

  Costs with other columns than today's are not kept.
  """
  if before is None or (before["config"], before["topology"]) != (
    name,
    topology,
  ):
    return {}
  columns = {field.name for field in dataclasses.fields(analyse.Cost)}
  return {p["name"]: p for p in before["programs"] if set(p) == columns}
