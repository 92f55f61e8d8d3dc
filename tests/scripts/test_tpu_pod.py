"""The launch script: what it would do, and what it does to a pretended pod."""

import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT

SCRIPT = ROOT / "scripts" / "tpu_pod.sh"
POD = {"TPU_NAME": "demo", "TPU_ZONE": "us-west4-a", "TPU_TYPE": "v5litepod-64"}
SSH = "+ gcloud compute tpus tpu-vm ssh demo --zone=us-west4-a --worker="
SCP = "+ gcloud compute tpus tpu-vm scp "
QUEUED = "gcloud compute tpus queued-resources "
RUN = ("run", "--config=configs/qwen3_8b.py:v5e_8x8", "--workdir=/mnt/runs/a b")


def _script(*arguments, path=None, **settings):
  env = {k: v for k, v in os.environ.items() if not k.startswith("TPU_")}
  env |= {"TMPDIR": "/tmp", **settings}
  if path:
    env["PATH"] = f"{path}:{env['PATH']}"
  return subprocess.run(
    ["bash", str(SCRIPT), *arguments],
    capture_output=True,
    text=True,
    check=False,
    env=env,
    cwd=ROOT,
    timeout=60,
  )


def _dry(*arguments, **settings) -> list[str]:
  done = _script("--dry-run", *arguments, **POD | settings)
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines()


def test_create_asks_for_the_slice():
  assert _dry("create") == [
    f"+ {QUEUED}create demo --node-id=demo --zone=us-west4-a "
    "--accelerator-type=v5litepod-64 --runtime-version=v2-alpha-tpuv5-lite"
  ]
  [line] = _dry(
    "create", TPU_TYPE="v6e-64", TPU_SPOT="1", TPU_PROJECT="p", TPU_BUCKET="b"
  )
  assert line == (
    f"+ {QUEUED}create demo --node-id=demo --zone=us-west4-a --project=p "
    "--accelerator-type=v6e-64 --runtime-version=v2-alpha-tpuv6e --spot "
    "--scopes=https://www.googleapis.com/auth/cloud-platform"
  )


def test_install_copies_the_commit_to_every_worker():
  archive, copy, packages, look = _dry("install")
  assert archive == (
    "+ git archive --format=tar.gz --output=/tmp/opera_jax.XXXXXXXXXX"
    "/opera_jax.tar.gz HEAD"
  )
  assert copy == (
    f"{SCP}/tmp/opera_jax.XXXXXXXXXX/opera_jax.tar.gz "
    "demo:opera_jax.tar.gz --zone=us-west4-a --worker=all"
  )
  assert packages == (
    f"{SSH}all '--command=mkdir -p opera_jax && tar xzf opera_jax.tar.gz -C "
    "opera_jax && cd opera_jax && python3 -m pip install --quiet --user uv && "
    "(test -d .venv || ~/.local/bin/uv venv --quiet --python 3.12 .venv) && "
    "~/.local/bin/uv pip install --quiet --python .venv -r "
    "requirements-tpu.txt'"
  )
  assert "jax.distributed.initialize()" in look


def test_run_starts_every_worker_with_its_words_apart():
  assert _dry(*RUN) == [
    f"{SSH}all '--command=cd opera_jax && if pgrep -F run.pid >/dev/null 2>&1; "
    "then echo it runs already: stop it first >&2; exit 1; fi; rm -f run.exit; "
    "(setsid nohup bash -c '\\''.venv/bin/python -m experiments.opera_rl "
    "--config.runtime.distributed=auto \"$@\"; echo $? > run.exit'\\'' run "
    "--config=configs/qwen3_8b.py:v5e_8x8 --workdir=/mnt/runs/a\\ b > run.log "
    "2>&1 < /dev/null & echo $! > run.pid)'"
  ]


def test_watch_status_stop_delete():
  assert _dry("watch") == [
    f"{SSH}0 '--command=tail -n 50 -F opera_jax/run.log'"
  ]
  assert _dry("stop") == [
    f"{SSH}all '--command=xargs -a opera_jax/run.pid pkill -TERM -P'"
  ]
  assert _dry("status")[0] == "tpu_pod: demo is ACTIVE"
  assert _dry("delete") == [
    f"+ {QUEUED}delete demo --zone=us-west4-a --force --quiet"
  ]


def test_resume_after_preemption_does_all_of_it_again():
  lines = _dry("resume", *RUN[1:])
  assert lines == [
    "tpu_pod: demo is SUSPENDED",
    *_dry("delete"),
    *_dry("create"),
    *_dry("wait"),
    *_dry("install"),
    *_dry(*RUN),
  ]


def test_a_bucket_is_a_name_and_no_command():
  (mount,) = [
    line
    for line in _dry("install", TPU_BUCKET="b; touch /tmp/$(id -u)")
    if "gcsfuse --implicit" in line
  ]
  assert r"gcsfuse --implicit-dirs b\;\ touch\ /tmp/\$\(id\ -u\) /mnt" in mount


def test_the_archive_is_written_through_no_link(tmp_path):
  """Another user of the machine may have laid one under a name he knows."""
  victim, temporary = tmp_path / "victim", tmp_path / "tmp"
  victim.write_text("precious")
  temporary.mkdir()
  (temporary / "opera_jax.tar.gz").symlink_to(victim)
  tools = tmp_path / "bin"
  tools.mkdir()
  log = tmp_path / "log"
  for name, text in (
    ("gcloud", f'#!/bin/sh\nls -ld "$5" >> {log} 2>/dev/null\nexit 0\n'),
    ("git", "#!/bin/sh\nfor a; do case $a in --output=*) "
            'echo archive > "${a#--output=}";; esac; done\n'),
  ):  # fmt: skip
    (tools / name).write_text(text)
    (tools / name).chmod(0o755)
  done = _script("install", path=tools, **POD | {"TMPDIR": str(temporary)})
  assert done.returncode == 0, done.stderr
  assert victim.read_text() == "precious"
  assert "opera_jax.tar.gz" in done.stdout
  # And nothing is left behind.
  assert [p.name for p in temporary.iterdir()] == ["opera_jax.tar.gz"]


def test_a_token_is_copied_and_never_shown(tmp_path):
  token = tmp_path / "token"
  token.write_text("hf_secret")
  done = _script("--dry-run", "install", TPU_TOKEN_FILE=str(token), **POD)
  assert f"{SCP}{token} demo:.cache/huggingface/token" in done.stdout
  assert "hf_secret" not in done.stdout + done.stderr


@pytest.mark.parametrize(
  "arguments, settings, message",
  [
    (("create",), {"TPU_ZONE": "z"}, "TPU_NAME is not set"),
    (("create",), {"TPU_NAME": "n"}, "TPU_ZONE is not set"),
    (("create",), {"TPU_NAME": "n", "TPU_ZONE": "z"}, "TPU_TYPE is not set"),
    (("create",), {**POD, "TPU_TYPE": "tpu7x-8"}, "TPU_TYPE=tpu7x-8"),
    (("run",), POD, "run takes the arguments"),
    (("resume",), POD, "resume takes the arguments"),
    (("fly",), POD, "unknown command 'fly'"),
  ],
)
def test_what_is_missing_is_named(arguments, settings, message):
  done = _script("--dry-run", *arguments, **settings)
  assert done.returncode == 2
  assert message in done.stderr


def test_help_needs_nothing():
  done = _script("--help")
  assert done.returncode == 0 and "TPU_TOKEN_FILE" in done.stdout


@pytest.fixture
def pod(tmp_path):
  """A `gcloud` that runs ssh commands here, with the folder as home."""
  binaries, home = tmp_path / "bin", tmp_path / "home"
  python = home / "opera_jax" / ".venv" / "bin" / "python"
  python.parent.mkdir(parents=True)
  binaries.mkdir()
  gcloud = binaries / "gcloud"
  gcloud.write_text(
    "#!/bin/bash\n"
    f"cd {home}; export HOME={home}\n"
    'for word; do case $word in --command=*) eval "${word#--command=}";'
    " esac; done\n"
    "if [[ $4 == describe ]]; then head -n 1 states; sed -i 1d states; fi\n"
  )
  python.write_text(
    "#!/bin/bash\n"
    'trap "echo saves; exit 3" TERM\n'
    'printf "[%s]" "$@"; echo\n'
    "for i in {1..200}; do sleep 0.05; test -f go && break; done; exit 5\n"
  )
  for file in (gcloud, python):
    file.chmod(0o755)
  return binaries, home


def _until(true, seconds=20):
  end = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < end, "waited in vain"
    time.sleep(0.05)


def test_a_run_outlives_its_ssh_and_tells_how_it_ended(pod):
  path, home = pod
  log, ended = home / "opera_jax" / "run.log", home / "opera_jax" / "run.exit"
  assert _script(*RUN, path=path, **POD).returncode == 0
  _until(lambda: log.exists() and "]" in log.read_text())
  assert log.read_text() == (
    "[-m][experiments.opera_rl][--config.runtime.distributed=auto]"
    "[--config=configs/qwen3_8b.py:v5e_8x8][--workdir=/mnt/runs/a b]\n"
  )
  again = _script(*RUN, path=path, **POD)
  assert again.returncode == 1 and "it runs already" in again.stderr
  assert "\nruns\n" in _script("status", path=path, **POD).stdout
  (home / "opera_jax" / "go").touch()
  _until(ended.exists)
  status = _script("status", path=path, **POD).stdout
  assert "ended with status\n5\n" in status


def test_stop_lets_the_run_save(pod):
  path, home = pod
  log, ended = home / "opera_jax" / "run.log", home / "opera_jax" / "run.exit"
  _script(*RUN, path=path, **POD)
  _until(lambda: log.exists() and "]" in log.read_text())
  assert _script("stop", path=path, **POD).returncode == 0
  _until(ended.exists)
  assert log.read_text().endswith("saves\n") and ended.read_text() == "3\n"


def test_wait_ends_when_the_slice_is_there_or_never_will_be(pod):
  path, home = pod
  (home / "states").write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
  done = _script("wait", path=path, TPU_POLL_SECONDS="0", **POD)
  assert done.returncode == 0 and done.stdout.count("demo is") == 3
  (home / "states").write_text("FAILED\n")
  done = _script("wait", path=path, TPU_POLL_SECONDS="0", **POD)
  assert done.returncode == 2 and "will not come" in done.stderr


def test_shellcheck_finds_nothing():
  program = shutil.which(
    "shellcheck", path=str(pathlib.Path(sys.executable).parent)
  )
  assert program, "pip install -r requirements-dev.txt"
  done = subprocess.run(
    [program, str(SCRIPT)], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout
