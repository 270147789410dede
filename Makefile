# Everything a fresh machine needs: `make demo` (the main job) and `make test`. Both set up .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-trust lint clean

demo: $(READY)
	$(BIN)/tqdit demo --out build/demo

test: lint
	$(BIN)/pytest

# Damage, kills, races and fuzzing at length: a quarter of an hour, more with TQDIT_TRUST_MINUTES.
test-trust: $(READY)
	$(BIN)/python bench/trust.py --json bench/results/trust.json

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "tqdit needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build
