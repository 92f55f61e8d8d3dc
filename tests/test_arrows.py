"""Packages import only what the plan allows."""

import ast

import pytest
from conftest import ROOT

KERNEL_APIS = "kernels.api"
ALLOWED = {
    "configs": set(),
    "kernels": set(),
    "structs": set(),
    "atomic_file": set(),
    "clock_metrics": set(),
    "config_fields": set(),
    "file_lock": {"sharding"},
    "gguf_header": set(),
    "hub": set(),
    "shipped": set(),
    "user_errors": set(),
    "config_file": {"config_fields", "shipped", "user_errors"},
    "config_flag": {"config_fields", "config_file", "user_errors"},
    "commands": {"user_errors"},
    "sharding": {"structs"},
    "losses": {"structs"},
    "advantages": {"structs"},
    "models": {"gguf_header", "hub", "sharding", KERNEL_APIS},
    "text": {"structs", "atomic_file", "gguf_header", "hub", KERNEL_APIS},
    "rewards": {"structs", "user_errors", "text", KERNEL_APIS},
    "data": {"structs", "atomic_file", "hub", "text"},
    "scoring": {"structs", "sharding", "models", "text", KERNEL_APIS},
    "rollout": {
        "structs", "sharding", "models", "text", "scoring", KERNEL_APIS,
    },
    "synthesis": {
        "structs", "hub", "shipped", "text", "data", "rollout", "scoring",
        "rewards",
    },
    "evals": {"structs", "text", "data", "rollout", "scoring", "rewards"},
    "train": {
        "structs", "atomic_file", "clock_metrics", "file_lock", "sharding",
        "losses",
    },
    "report": {"structs", "atomic_file", "clock_metrics", "evals"},
    "rl": {
        "structs", "atomic_file", "user_errors", "sharding", "text", "data",
        "rollout",
        "scoring", "rewards", "advantages", "losses", "train",
    },
    "run": {
        "structs", "atomic_file", "config_file", "file_lock", "gguf_header",
        "hub", "shipped", "user_errors", "sharding", "models", "text", "data",
        "rollout", "scoring", "rewards", "advantages", "losses", "synthesis",
        "train", "rl",
    },
    "stages": {
        "structs", "atomic_file", "config_fields", "file_lock", "hub",
        "shipped", "user_errors", "sharding", "models", "text", "data",
        "rollout", "scoring",
        "rewards", "advantages", "losses", "synthesis", "train", "rl",
        "evals", "report", "run",
    },
    "plan": {
        "structs", "sharding", "models", "rollout", "scoring", "train", "rl",
        "run",
    },
    "experiments": {
        "structs", "atomic_file", "commands", "config_fields", "config_file",
        "config_flag", "file_lock", "hub", "shipped", "sharding", "models",
        "text", "data", "rollout", "scoring", "rewards", "advantages",
        "losses", "synthesis", "train", "rl", "evals", "report", "run",
        "stages", "plan",
    },
}  # fmt: skip


def _package(module: str) -> str | None:
  """Our package of an imported module; None for other people's."""
  parts = module.split(".")
  if parts[0] != "opera_jax" or len(parts) == 1:
    return None
  if parts[1] == "kernels":
    return KERNEL_APIS if parts[-1] in ("api", "target", "tiles") else "kernels"
  return parts[1]


def _imports(path):
  """Every module a file imports, as `a.b.c` of what is used."""
  tree = ast.parse(path.read_text())
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, alias.name
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: import absolutely"
      for alias in node.names:
        yield node.lineno, f"{node.module}.{alias.name}"


def _files():
  for top in ("configs", "kernels", "experiments", "opera_jax"):
    for path in sorted((ROOT / top).rglob("*.py")):
      relative = path.relative_to(ROOT)
      name = relative.parts[1] if top == "opera_jax" else top
      yield path, relative, name.removesuffix(".py")


def test_arrows():
  wrong, seen = [], 0
  for path, relative, own in _files():
    if own == "__init__":
      continue
    for line, module in _imports(path):
      package = _package(module)
      inside = package == own or (own == "kernels" and package == KERNEL_APIS)
      seen += package is not None
      same_driver = own == "experiments" and package == "experiments"
      if package is None or (inside and not same_driver):
        continue
      if package not in ALLOWED[own]:
        wrong.append(f"{relative}:{line}: {own} may not import {module}")
  assert seen > 100
  assert not wrong, "\n".join(wrong)


LINKED = ("configs", "kernels", "experiments")


@pytest.mark.parametrize("top", [*LINKED, "opera_jax", "tests", "benchmarks"])
def test_every_module_has_one_name(top):
  """The linked folders are imported as parts of `opera_jax`, everywhere."""
  found = 0
  for path in sorted((ROOT / top).rglob("*.py")):
    for line, module in _imports(path):
      found += 1
      alone = module.split(".")[0] in LINKED
      assert not alone, f"{path}:{line}: import opera_jax.{module}"
  assert found > 10


@pytest.mark.parametrize("name", ["ml_collections", "absl"])
def test_configs_stop_at_the_driver(name):
  for path, relative, own in _files():
    if own in (
      *("configs", "experiments", "config_flag"),
      *("config_file", "commands"),
    ):
      continue
    for line, module in _imports(path):
      assert module.split(".")[0] != name, f"{relative}:{line}: {module}"


def test_every_package_is_in_the_plan():
  own = {name for _, _, name in _files()} - {"__init__"}
  assert own == set(ALLOWED)
