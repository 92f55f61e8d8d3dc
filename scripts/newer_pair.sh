#!/usr/bin/env bash
# The fast tests on the newest pair of jax and flax that the package's ranges
# allow, with Python 3.12; all else as it is pinned. Arguments go to pytest.
# PYTHON names the interpreter, VENV the environment to make or use again.
set -euo pipefail
cd "$(dirname "$0")/.."

jax=0.11.2
flax=0.12.10
python=${PYTHON:-python3.12}
venv=${VENV:-.venv-newer}

"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || {
  echo "newer_pair: jax $jax needs Python 3.12; name one: PYTHON=python3.12" >&2
  exit 2
}
wanted=$(mktemp)
locked=$(mktemp)
trap 'rm -f "$wanted" "$locked"' EXIT
# What moves with jax and flax is left to the resolver.
names='jax|jaxlib|flax|libtpu|ml_dtypes|optax|orbax-checkpoint|tensorstore'
moves="^(-r |($names)(==|\[))"
for file in requirements.txt requirements-judge.txt requirements-docs.txt \
  requirements-dev.txt; do
  grep -vE "$moves" "$file"
done > "$wanted"
printf "%s\n" "jax[tpu]==$jax" "flax==$flax" optax orbax-checkpoint \
  >> "$wanted"
grep -vE "$moves" requirements.lock > "$locked"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet -c "$locked" -r "$wanted"
"$venv/bin/python" -c 'import jax, flax; print(jax.__version__, flax.__version__)'
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 exec "$venv/bin/python" -m pytest \
  -n 2 --dist loadfile -m "not slow" "$@"
