"""Plans a run on a topology: all programs, and a lower bound of a step's
time."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from typing import Any

import jax

from opera_jax.models import decoder
from opera_jax.plan import analyse, hardware, memory_floor, programs
from opera_jax.sharding import mesh as mesh_lib

SECTIONS = ("model", "engine", "rollout", "scoring", "sft", "rl")


def make(
  topology: str,
  mesh: Mapping[str, int],
  sections: Mapping[str, Mapping[str, Any]],
  *,
  name: str,
  names: tuple[str, ...] = programs.NAMES,
  before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Compiles the programs of a run and sums their costs.

  This turns JAX's compilation cache off: programs for absent hardware can be
  written to it, but not read.

  Args:
    topology: see `hardware.parse`.
    mesh: see `sharding.mesh.create`.
    sections: config sections by the names in SECTIONS.
    name: of the config.
    names: the programs to compile, of `programs.NAMES`.
    before: an earlier plan of the same config and topology; its other programs
      are kept.

  Returns:
    The plan, which JSON and `render` can write.

  Raises:
    ValueError: an unknown topology or program, sizes that do not divide.
  """
  jax.config.update("jax_enable_compilation_cache", False)
  chip, count = hardware.parse(topology)
  laid_out = mesh_lib.create(dict(mesh), hardware.devices(topology))
  costs = kept(before, name, topology)
  for program in programs.build(laid_out, **sections, names=names):
    print(f"plan: compiling {program.name} ({program.shape})", flush=True)
    costs[program.name] = dataclasses.asdict(
      analyse.analyse(program, laid_out, chip)
    )
  ordered = [costs[n] for n in programs.NAMES if n in costs]
  parts = {c["name"]: c["calls"] * c["seconds"] for c in ordered if c["calls"]}
  model, rl = decoder.Config(**sections["model"]), sections["rl"]
  packages = ("jax", "libtpu")
  return {
    "config": name,
    "topology": topology,
    "devices": count,
    "chips": count // chip.devices,
    "hbm_bytes": chip.hbm_bytes,
    "mesh": dict(laid_out.shape),
    "versions": ", ".join(
      f"{package} {importlib.metadata.version(package)}" for package in packages
    ),
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
    "step_seconds": sum(parts.values()),
    "step_parts": parts,
    "programs": ordered,
  }


def kept(
  before: Mapping[str, Any] | None, name: str, topology: str
) -> dict[str, Any]:
  """Costs by program of an earlier plan with the same config and topology."""
  if before is None or (before["config"], before["topology"]) != (
    name,
    topology,
  ):
    return {}
  return {p["name"]: p for p in before["programs"]}
