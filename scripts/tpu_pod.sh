#!/usr/bin/env bash
# One TPU slice from request to deletion. docs/tpu.md walks through it.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: scripts/tpu_pod.sh [--dry-run] COMMAND [ARGUMENTS]

  create          request the slice (a queued resource)
  wait            until it is there
  install         this commit and what it needs, on every worker
  run ARGUMENTS   start experiments.opera_rl on every worker, detached
  watch           follow the log of worker 0 (Ctrl-C stops watching only)
  status          state of the slice; whether the run has ended, and how
  stop            end the run; it saves a checkpoint first
  resume ARGUMENTS  after a preemption: request anew, install, run
  delete          give the slice back; what is not in the shared folder is lost

--dry-run prints the commands and runs none. Settings are variables:

  TPU_NAME        any name                                    (required)
  TPU_ZONE        e.g. us-central2-b                          (required)
  TPU_TYPE        e.g. v5litepod-64, v5p-128, v6e-64          (create, resume)
  TPU_PROJECT     project; default: that of gcloud
  TPU_RUNTIME     VM image; default: that of TPU_TYPE
  TPU_SPOT        1: cheaper, can be taken away at any time
  TPU_BUCKET      a Cloud Storage bucket, mounted at /mnt/runs on every worker
  TPU_TOKEN_FILE  file with a Hugging Face token, copied and never shown
TEXT
}

fail() {
  echo "tpu_pod: $*" >&2
  exit 2
}

dry=0
if [[ ${1:-} == --dry-run ]]; then
  dry=1
  shift
fi
command=${1:-}
if [[ -z $command || $command == help || $command == --help ]]; then
  usage
  exit 0
fi
shift

[[ -n ${TPU_NAME:-} ]] || fail "TPU_NAME is not set; export TPU_NAME=my-slice."
[[ -n ${TPU_ZONE:-} ]] || fail "TPU_ZONE is not set; docs/tpu.md lists zones."
place=("--zone=$TPU_ZONE")
[[ -z ${TPU_PROJECT:-} ]] || place+=("--project=$TPU_PROJECT")
poll_seconds=${TPU_POLL_SECONDS:-30}

# Prints a command and, unless this is a dry run, runs it.
call() {
  local word line=+
  for word in "$@"; do
    if [[ $word == *[!a-zA-Z0-9_=:,./@+-]* ]]; then word=${word@Q}; fi
    line+=" $word"
  done
  echo "$line"
  if ((!dry)); then "$@"; fi
}

on_workers() {
  call gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${place[@]}" \
    "--worker=$1" "--command=$2"
}

to_workers() {
  call gcloud compute tpus tpu-vm scp "$1" "$TPU_NAME:$2" "${place[@]}" \
    --worker=all
}

runtime() {
  if [[ -n ${TPU_RUNTIME:-} ]]; then
    echo "$TPU_RUNTIME"
    return
  fi
  case $TPU_TYPE in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "no default image for TPU_TYPE=$TPU_TYPE; it is v5litepod-N," \
      "v5p-N or v6e-N, or set TPU_RUNTIME. TPU7x is had through GKE." ;;
  esac
}

# ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; NONE where nothing is asked.
# A dry run takes its argument.
state() {
  if ((dry)); then
    echo "$1"
    return
  fi
  gcloud compute tpus queued-resources describe "$TPU_NAME" "${place[@]}" \
    '--format=value(state.state)' 2>/dev/null || echo NONE
}

create() {
  [[ -n ${TPU_TYPE:-} ]] || fail "TPU_TYPE is not set; e.g. v5litepod-64."
  local image
  image=$(runtime)
  local request=(gcloud compute tpus queued-resources create "$TPU_NAME"
    "--node-id=$TPU_NAME" "${place[@]}" "--accelerator-type=$TPU_TYPE"
    "--runtime-version=$image")
  if [[ ${TPU_SPOT:-0} == 1 ]]; then request+=(--spot); fi
  if [[ -n ${TPU_BUCKET:-} ]]; then
    request+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
  fi
  call "${request[@]}"
}

wait_active() {
  local now
  while true; do
    now=$(state ACTIVE)
    echo "tpu_pod: $TPU_NAME is $now"
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | NONE)
        fail "$TPU_NAME will not come; see 'status', then 'resume' or 'delete'."
        ;;
    esac
    sleep "$poll_seconds"
  done
}

install() {
  # In a folder of our own: a name that others know could be a link of theirs.
  local folder=${TMPDIR:-/tmp}/opera_jax.XXXXXXXXXX
  if ((!dry)); then
    folder=$(mktemp -d "$folder")
    # shellcheck disable=SC2064  # the folder's name of now
    trap "rm -rf ${folder@Q}" EXIT
  fi
  local archive=$folder/opera_jax.tar.gz
  call git archive --format=tar.gz "--output=$archive" HEAD
  to_workers "$archive" opera_jax.tar.gz
  # The image's Python is older than ours: uv brings its own.
  on_workers all 'mkdir -p opera_jax && tar xzf opera_jax.tar.gz -C opera_jax && cd opera_jax && python3 -m pip install --quiet --user uv && (test -d .venv || ~/.local/bin/uv venv --quiet --python 3.12 .venv) && ~/.local/bin/uv pip install --quiet --python .venv -r requirements-tpu.txt'
  if [[ -n ${TPU_TOKEN_FILE:-} ]]; then
    on_workers all 'mkdir -p -m 700 .cache/huggingface'
    to_workers "$TPU_TOKEN_FILE" .cache/huggingface/token
    on_workers all 'chmod 600 .cache/huggingface/token'
  fi
  if [[ -n ${TPU_BUCKET:-} ]]; then
    local bucket
    printf -v bucket %q "$TPU_BUCKET"
    on_workers all "mountpoint -q /mnt/runs || { echo \"deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null && curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null && sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse && sudo mkdir -p /mnt/runs && sudo chown \$USER /mnt/runs && gcsfuse --implicit-dirs $bucket /mnt/runs; }"
  fi
  on_workers all 'cd opera_jax && .venv/bin/python -c "import jax; jax.distributed.initialize(); print(jax.process_index(), \"of\", jax.process_count(), \"hosts,\", jax.device_count(), \"devices\")"'
}

run() {
  (($#)) || fail "run takes the arguments of experiments.opera_rl, e.g." \
    "--config=configs/qwen3_8b.py:v5e_8x8 --workdir=/mnt/runs/qwen3_8b."
  local arguments
  printf -v arguments ' %q' "$@"
  local start="cd opera_jax && if pgrep -F run.pid >/dev/null 2>&1; then echo it runs already: stop it first >&2; exit 1; fi; rm -f run.exit; (setsid nohup bash -c '.venv/bin/python -m experiments.opera_rl --config.runtime.distributed=auto \"\$@\"; echo \$? > run.exit' run$arguments > run.log 2>&1 < /dev/null & echo \$! > run.pid)"
  on_workers all "$start"
}

status() {
  echo "tpu_pod: $TPU_NAME is $(state ACTIVE)"
  on_workers all 'cd opera_jax && hostname && if test -f run.exit; then echo ended with status && cat run.exit; else echo runs; fi; tail -n 2 run.log'
}

delete() {
  call gcloud compute tpus queued-resources delete "$TPU_NAME" "${place[@]}" \
    --force --quiet
}

resume() {
  (($#)) || fail "resume takes the arguments that run was given."
  local now
  now=$(state SUSPENDED)
  echo "tpu_pod: $TPU_NAME is $now"
  case $now in
    ACTIVE) ;;
    NONE) create ;;
    SUSPENDED | SUSPENDING | FAILED)
      delete
      create
      ;;
  esac
  wait_active
  install
  run "$@"
}

case $command in
  create) create ;;
  wait) wait_active ;;
  install) install ;;
  run) run "$@" ;;
  watch) on_workers 0 'tail -n 50 -F opera_jax/run.log' ;;
  status) status ;;
  # A child of the shell whose id is kept: the run itself.
  stop) on_workers all 'xargs -a opera_jax/run.pid pkill -TERM -P' ;;
  resume) resume "$@" ;;
  delete) delete ;;
  *)
    usage >&2
    fail "unknown command '$command'."
    ;;
esac
