# Needs Python 3.11 or newer, make and git; everything else is installed into .venv.
VENV := .venv
BIN := $(VENV)/bin
UV := 0.13.9
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# On a GPU machine: its own Python, with PyTorch and Lightning installed, and no network.
GPU_PYTHON := python3
GPU_REHEARSAL_PYTHON :=
OUT ?= gpu-results

.PHONY: setup train test test-all bench gpu gpu-rehearsal check docs format constraints

setup: $(VENV)/ready  ## install into .venv, at the versions and hashes of constraints.txt

$(VENV)/ready: constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; install one" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==$(UV)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r constraints.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

train: setup  ## a first run: handwritten digits, two workers, a minute or two
	$(BIN)/python -m cifar_dist.train --dataset digits --num-workers 2 --max-epochs 6

# One thread each: threads of two processes that wait for each other on two cores take ten times as long.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
SIDE_BY_SIDE := --numprocesses 2 --dist loadfile --no-loadscope-reorder --ignore tests/faults

test: check  ## every promise once: before a commit
	$(PYTEST) $(SIDE_BY_SIDE) -m "not slow"

test-all: test  ## and faults, several hosts, Slurm, object stores, the browser
	$(PYTEST) $(SIDE_BY_SIDE) -m slow
	$(PYTEST) tests/faults  # alone: beside other clusters hosts may fail to join

check: setup  ## format, lint, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup  ## docs/flags.md, from the settings' declarations
	$(BIN)/python docs/generate.py

format: setup  ## put code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

constraints: setup  ## resolve pyproject.toml anew into constraints.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --generate-hashes \
		--no-emit-index-url --no-annotate --no-header --upgrade pyproject.toml -o constraints.txt

bench: setup  ## the benchmarks with their peers (without asha_against_random, of hours, and preset, on CIFAR-10)
	for each in loader startup step memory tune scaling determinism workers_agree worker_lost \
		trial_overhead; do \
		$(BIN)/python -m benchmarks.$$each || exit 1; done

# Without setup: such a machine cannot install anything.
gpu:  ## on a GPU machine: all that only a GPU can show, in at most nine minutes, into $OUT
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) -m benchmarks.gpu_campaign --output "$(OUT)"

gpu-rehearsal: setup  ## the same on a CPU, small, in a GPU machine's environment (Python 3.12, 6 GB)
	$(BIN)/python -m benchmarks.gpu_rehearsal --uv $(BIN)/uv --python "$(GPU_REHEARSAL_PYTHON)"
