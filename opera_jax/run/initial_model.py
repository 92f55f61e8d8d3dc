"""The model that a stage starts from: of this run, of another one, or a file.

`config.sft.init` and `config.rl.init` name it:

    ""                the stage before: base for SFT, sft for RL
    base, sft         a stage of this run
    runs/other/sft    a finished stage of another run
    anything else     a checkpoint: directory, GGUF file or hub id

A model that is not of this run must have its sizes and its tokenizer. A run
that has no checkpoint of its own takes the tokenizer of the other run.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from opera_jax import user_errors
from opera_jax.models import decoder, hf_config
from opera_jax.run import workdir as workdir_lib

STAGES = ("base", "sft", "rl")  # whose models a run saves
OTHER = "init"  # what tables and records call a model of no stage of the run
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def lineage(config: Mapping[str, Any]) -> tuple[str, ...]:
  """The models of a run in training order, as `Run.load` takes them.

  Args:
    config: nested values, as in configs/common.py.

  Returns:
    ("base", "sft", "rl") by default; ("base", "rl") if RL starts from the base
    model.
  """
  before = config["rl"]["init"] or "sft"
  if before != "sft":
    return (before, "rl")
  return (config["sft"]["init"] or "base", "sft", "rl")


def others(config: Mapping[str, Any]) -> tuple[str, ...]:
  """The models that the config names and this run does not make."""
  found = (config["sft"]["init"], config["rl"]["init"])
  return tuple(name for name in found if name and name not in STAGES)


def reads_base(config: Mapping[str, Any], stages: set[str]) -> bool:
  """Whether one of the stages needs this run's base model.

  Args:
    config: nested values, as in configs/common.py.
    stages: of `experiments.opera_rl`.
  """
  if stages & {"base", "synthesize", "select"}:
    return True
  if "rl" in stages and config["rl"]["teacher"] == "base":
    return True
  if "sft" in stages and config["sft"]["init"] in ("", "base"):
    return True
  compared = bool(stages & {"sft", "rl", "evaluate"})
  return compared and lineage(config)[0] == "base"


def label(name: str) -> str:
  """What tables and records call a model."""
  return name if name in STAGES else OTHER


def other_run(name: str) -> tuple[pathlib.Path, str] | None:
  """(workdir, stage) of a model that another run has made; None if it is of
  this run, a checkpoint, or not there."""
  path = pathlib.Path(name)
  is_stage = any((path / f).exists() for f in ("DONE.json", "SETTINGS.json"))
  if name in STAGES or not is_stage:
    return None
  path = path.resolve()
  return path.parent, path.name


def is_checkpoint(name: str) -> bool:
  """Whether a name is that of a checkpoint: files here, or an id on the hub."""
  path = pathlib.Path(name)
  if name in STAGES or other_run(name):
    return False
  # "runs/other" where runs/ exists is a mistyped folder, and no id.
  is_id = bool(_HUB_ID.fullmatch(name)) and not path.parent.exists()
  return path.exists() or is_id


def fault(
  field: str,
  name: str,
  allowed: Sequence[str],
  workdir: str | os.PathLike | None = None,
) -> str:
  """What is wrong with a value of `init`; "" if nothing is.

  Args:
    field: "config.rl.init".
    name: its value, not empty.
    allowed: stages of this run that it may name.
    workdir: of this run; None if it has none.
  """
  if name in allowed:
    return ""
  if name in STAGES:
    return f"{field} is {name!r}, which that stage cannot start from; use " + (
      " or ".join(map(repr, allowed))
    )
  found = other_run(name)
  if found:
    if workdir is not None and found[0] == pathlib.Path(workdir).resolve():
      return (
        f"{field} is {name!r}, a stage of this very run; use "
        f"{' or '.join(map(repr, allowed))}, or name another --workdir"
      )
    if workdir_lib.model(*found) is None:
      return (
        f"{field} is {name!r}, a stage that has left no model; finish that "
        "run, or name another of its stages"
      )
    return ""
  if is_checkpoint(name):
    return ""
  path = pathlib.Path(name)
  near = [
    str(folder / file.name)
    for folder in (path.parent, path.parent.parent)
    if folder.is_dir()
    for file in folder.glob("*")
  ]
  hint = user_errors.nearest(name, [*allowed, *near])
  return (
    f"{field} is {name!r}, and nothing is there{hint}; name a stage of this "
    f"run ({', '.join(allowed)}), the folder of another run's stage, such as "
    "runs/other/sft, or a checkpoint"
  )


def check(
  name: str, config: decoder.Config, tokenizer: str, added_tokens: bool
) -> None:
  """Refuses a model of other sizes or another tokenizer than the run's.

  Args:
    name: another run's stage, or a checkpoint.
    config: of the run's model.
    tokenizer: SHA-256 of the run's tokenizer.
    added_tokens: whether the run's tokenizer has tokens that its checkpoint's
      has not; then the embedding may have to grow.

  Raises:
    ValueError: names what differs.
  """
  found = other_run(name)
  ours = {k: v for k, v in _plain(config).items() if k not in hf_config.FREE}
  if found:
    record = workdir_lib.settings(*found)
    if not record:
      raise ValueError(
        f"The model {name} has lost its stage's SETTINGS.json, which says its "
        "sizes and its tokenizer. Restore that file from a copy, or name "
        "another model."
      )
    theirs = workdir_lib.nested(record).get("model", {})
    remedy = f"give the config of that run, --config={found[0]}/config.json"
  else:
    theirs = _plain(hf_config.read(name))
    if added_tokens and theirs["vocab_size"] < ours["vocab_size"]:
      theirs["vocab_size"] = ours["vocab_size"]
    remedy = "name a checkpoint of the same model as config.checkpoint"
  wrong = [
    f"{field} is {theirs.get(field)!r} there and {value!r} here"
    for field, value in ours.items()
    if theirs.get(field) != value
  ]
  if found and not wrong:
    digest = workdir_lib.made_from(*found).get("tokenizer", "none")
    if digest != tokenizer:
      wrong = [
        f"its tokenizer is {digest[:12]} and the run's {tokenizer[:12]} "
        "(sha256)"
      ]
  if wrong:
    raise ValueError(
      f"The model {name} does not fit this run: {'; '.join(wrong)}. To start "
      f"from it, {remedy}."
    )


def _plain(config: decoder.Config) -> dict[str, Any]:
  """The fields of a model as a stage records them."""
  return json.loads(json.dumps(dataclasses.asdict(config)))
