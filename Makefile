# One command each; every target makes the environment it needs. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEEDS ?= 10000
MINUTES ?= 20
# One more than the cores of a small machine: a fifth of the time of a test is waiting for processes.
WORKERS ?= 3
# Hundreds of processes are started; none of them should have to compile the project anew, whatever the shell says.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench check sim mutants soak etcds proto wheel lock clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test,dev]'
	@touch $@

demo: $(VENV)/.installed  ## bundled store, proxy, 1,000 client watches: prints the reduction
	$(BIN)/watchmux demo

test: $(VENV)/.installed-dev etcds  ## the tests (under 5 minutes on 2 cores)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not long"

test-all: $(VENV)/.installed-dev etcds  ## every etcd version, every client, long faults (under 30 minutes)
	-@$(BIN)/python -m tests.clients.golang
	-@$(BIN)/python -m tests.etcd.fronts
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

check: $(VENV)/.installed-dev  ## ruff, mypy --strict, the rules for imports, sizes, names, words and pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py tests/test_rules.py tests/test_docs.py tests/test_pages.py

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test,dev,bench]'
	@touch $@

bench: $(VENV)/.installed-bench etcds  ## CPU per event, delay, memory compared with grpc-proxy; the store compared with etcd; ARGS='--case store'
	$(BIN)/python -m tests.bench $(ARGS)

sim: $(VENV)/.installed-dev  ## SEEDS=n seeds of the simulator: faults by kind, events checked, violations
	$(BIN)/python -m tests.sim SEEDS=$(SEEDS)

mutants: $(VENV)/.installed-dev  ## the mutation score: deliberate bugs that the simulator finds
	$(BIN)/python -m tests.sim --mutants

soak: $(VENV)/.installed-bench etcds  ## MINUTES=n of clients and faults at random: guarantees and leaks; build/soak/report.md
	GRPC_ENABLE_FORK_SUPPORT=0 $(BIN)/python -m tests.soak --minutes $(MINUTES) $(ARGS)

etcds: $(VENV)/.installed-dev  ## fetch the real etcds and client libraries that the tests run against
	@$(BIN)/python -m tests.etcd.binaries
	@$(BIN)/python -m tests.clients.libraries

proto: $(VENV)/.installed-dev  ## regenerate proto/pb from the .proto files
	$(BIN)/python -m proto.generate

wheel: $(VENV)/.installed  ## the wheel of this commit in dist/, for pip, pipx and the container
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

lock: $(VENV)/.installed  ## requirements.lock: the exact version of each dependency, resolved anew
	$(BIN)/python -m tests.lock

clean:  ## remove what the other targets made
	rm -rf $(VENV) .etcd .clients build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
