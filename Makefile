# quickstart and test make their own .venv; a second run does nothing twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On a machine with CUDA, set CONSTRAINTS= to keep its own build of torch.
CONSTRAINTS ?= constraints-cpu.txt
PIP := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# Files of tests side by side, or folders that share what is costly (tests/session/groups.py).
PYTEST_PROCESSES ?= -n 2 --dist loadgroup
export OMP_NUM_THREADS ?= 1
# Installed without compiling; what is imported, a part of it, is compiled once and kept, whatever the shell says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart test test-all test-matrix lint clean

quickstart: $(VENV)/.installed
	$(BIN)/python tools/quickstart.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_PROCESSES) -m "not slow"

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_PROCESSES)

# Under other kernels, threads, load and order; an hour and a half on two cores.
test-matrix: $(VENV)/.installed-test
	$(BIN)/python -m tests.session.matrix

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck .ci/run docker/*.sh docker/slurm/*

# Without constraints the packages that are there, as a container's own torch, are kept and seen.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(if $(CONSTRAINTS),,--system-site-packages) $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml $(CONSTRAINTS)
	@echo "installing into $(VENV): a few minutes, once"
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) runs
