# Everything runs in .venv, which is made and filled as needed. PYTHON=... chooses the interpreter.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help test demo bench lint format clean

help:
	@echo 'make demo    a program that plain Unicorn cannot run, run right'
	@echo 'make test    the tests'
	@echo 'make lint    ruff and mypy'
	@echo 'make bench   the benchmarks: the sandbox beside plain Unicorn'
	@echo 'make format  let ruff format the code'
	@echo 'make clean   remove $(VENV) and caches'

test: $(VENV)/dev
	$(BIN)/python -m pytest -n auto

demo: $(VENV)/core
	@$(BIN)/python -m guests.demo

bench: $(VENV)/core
	@$(BIN)/python -m sandbox bench

lint: $(VENV)/dev
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

format: $(VENV)/dev
	$(BIN)/python -m ruff format

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

# Each file says what has been installed since pyproject.toml changed.
$(VENV)/core: pyproject.toml | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/dev: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/core

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo 'No Python 3.11 or later found: install one, or name it: make PYTHON=/path/to/python' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"$(PYTHON) is Python {v[0]}.{v[1]}, but 3.11 or later is needed: make PYTHON=/path/to/python")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
