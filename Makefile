# Every target sets itself up: it needs Python >= 3.11, make and a network the first time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: install demo test test-fast test-all lint bench accept torture fuzz format clean

install: $(READY)

# The stamp is written last, so an install that was cut off is taken up again.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vlmpo needs Python 3.11 or newer; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/vlmpo demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Files are shared out over two processes, each file as a whole: its fixtures are made once.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile

# What continuous integration runs: all but the long tests.
test: lint
	$(PYTEST) -m "not long"

# Tests that neither train nor start a process; under 90 seconds on two idle cores.
test-fast: $(READY)
	$(PYTEST) -m "not slow and not long"

# Every test: sweeps, the whole demo, the acceptance runs on real pairs.
test-all: lint
	$(PYTEST)

# Time and memory of a step against TRL, plain code and the floor, side by side; some twenty minutes on two idle cores.
bench: $(READY)
	$(BIN)/python -m benchmarks.bench

# The long runs on real pairs, about a quarter of an hour. They read ../shared/data and are skipped if it is absent.
accept: $(READY)
	$(BIN)/python -m pytest -q -s -m long tests/acceptance

# Kills runs, damages checkpoints, fills disks, and compares how each ends with an uninterrupted run; some twenty minutes.
torture: $(READY)
	$(BIN)/python -m tests.torture --figures docs/reliability.md --json runs/torture.json

# Broken input for every reader, 100,000 each; some twenty minutes.
fuzz: $(READY)
	$(BIN)/python -m tests.fuzz --figures docs/reliability.md --json runs/fuzz.json

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
