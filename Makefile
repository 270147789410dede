# Everything a fresh machine needs: `make demo` (the main job) and `make test`. Both set up .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/.runs
READY := $(VENV)/.ready
WORKERS ?= 2
GPU_WORKERS ?= 12
DIFFUSERS ?= ../diffusers
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist loadfile

.PHONY: demo test chromium test-all test-gpu test-trust test-classes lint docs release-check clean

demo: $(RUNS)
	@echo "The demo takes five to ten minutes on two cores."
	$(BIN)/tqdit demo --out build/demo

test: lint
	$(PYTEST)

# The browser of the test of `tqdit serve`, on Debian and as root; without it the test is skipped.
chromium:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null

# Also what takes half a minute of a processor or more: compiling every kernel, training, full-size runs.
test-all: lint
	$(PYTEST) -m "not trust"

# What needs a GPU. Most of the time kernels compile, which several processes do beside each other.
test-gpu: $(READY)
	$(BIN)/pytest -n $(GPU_WORKERS) --dist worksteal -m gpu

# Damage, kills, races and fuzzing at length: a quarter of an hour, more with TQDIT_TRUST_MINUTES.
test-trust: $(READY)
	$(BIN)/python bench/trust.py --json bench/results/trust.json

# A tiny model of every transformer class of diffusers: recorded, quantized, saved, loaded and run. DIFFUSERS: a checkout
# of diffusers' repository at the installed version, whose tests have the configs.
test-classes: $(READY)
	mkdir -p build
	$(BIN)/python -W ignore bench/class_sweep.py --diffusers $(DIFFUSERS) --out build/class-sweep.json

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation site, with warnings as errors: build/site/index.html. The tests build it, too (tests/test_site.py).
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Wheel and sdist, checked and installed in clean environments: minutes, PyTorch is installed twice.
release-check: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[release]"
	$(BIN)/python bench/release_check.py

# What the demo needs: no linters, no type checker, no Triton of its own.
$(RUNS): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "tqdit needs Python 3.11 or newer"'
	@echo "Installing into $(VENV): PyTorch and what tqdit needs, 1 to 6 GB with PyTorch's CUDA libraries; minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[report]"
	touch $@

# What the tests and linters need besides.
$(READY): $(RUNS)
	@echo "Installing what tests and linters need into $(VENV)."
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build
