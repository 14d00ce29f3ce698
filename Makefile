# Everything runs in .venv, which the first call makes. PYTHON is the interpreter that makes it (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-containers check unit bench clean

demo: $(READY)
	@$(BIN)/slmops demo

test: $(READY)
	@$(MAKE) --no-print-directory --jobs=2 check unit
	@$(BIN)/python -m pytest tests/integration tests/e2e -n 4 --dist loadfile --no-loadscope-reorder

test-containers: $(READY)
	@$(BIN)/python -m pytest tests/containers

check: $(READY)
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@for system in darwin win32; do $(BIN)/mypy --platform $$system --cache-dir .mypy_cache/$$system || exit; done
	@$(BIN)/mypy benchmarks/*.py
	@$(BIN)/lint-imports --no-logo

unit: $(READY)
	@$(BIN)/python -m pytest tests/unit -n auto

bench: $(READY)
	@$(BIN)/python benchmarks/bench.py

clean:
	@if [ -x $(BIN)/slmops ]; then $(BIN)/slmops down; fi
	rm -rf $(VENV) .slmops build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "slmops needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 2; }
	@echo "installing into $(VENV) (once, some minutes)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
