# Every target works alone on a fresh clone. PYTHON: 3.11 or newer. PIP_ARGS: extra arguments for pip.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

.PHONY: help demo test test-all check install install-dev clean

help:
	@echo "make demo      install, then pictures -> shards -> three trained models -> pictures and a score"
	@echo "               (SMOKE=1: every step in under two minutes; the pictures will not look like anything)"
	@echo "make test      install what tests need, then run them"
	@echo "make test-all  the same with the long proofs"
	@echo "make check     ruff, mypy, architecture tests, fast tests"
	@echo "make clean     remove the virtual environment and what the demo made"

demo: $(VENV)/.installed
	LDM=$(BIN)/ldm SMOKE=$(SMOKE) bash scripts/demo.sh

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not long"

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile -q -m "not slow and not long"

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# torch first and by its exact version: asked for by another package alone, pip may take a newer build.
$(VENV)/.installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "ldm needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "no venv module: apt-get install python3-venv"; exit 1; }
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[data,dev]'
	$(PIP) --no-deps k-diffusion  # its own dependencies want numpy < 2; the tests need one file of it
	@touch $@

clean:
	rm -rf $(VENV) runs/demo runs/smoke
