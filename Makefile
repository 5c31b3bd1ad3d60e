# Needs Python 3.11 with pip, make and a C++ compiler. Everything goes into .venv; the environment is passed on as it is.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := orchestrator jobs strategies cluster
STAMP := $(VENV)/.installed
# `make test PYTEST_ARGS="-k schedule -x"`
PYTEST_ARGS ?=
# Of tests that do not start Ray; the others run one after the other. Each takes about 1 GiB.
PROCESSES ?= 2
NOTHING_CHOSEN := 5

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all lint format bench lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv and install the pinned environment (once)

$(STAMP): requirements.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "got Python %d.%d; expected 3.11 or newer. Run make PYTHON=/path/to/python3.11" % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

quickstart: setup ## Make a small teacher, distill a student from it on this machine, and compare
	$(BIN)/distill quickstart

test: lint ## Lint, types, and every test that needs no GPU and no patience
	$(BIN)/python -m pytest -m "not slow and not gpu and not cluster" -n $(PROCESSES) --dist loadfile $(PYTEST_ARGS) || [ $$? -eq $(NOTHING_CHOSEN) ]
	$(BIN)/python -m pytest -m "not slow and not gpu and cluster" $(PYTEST_ARGS) || [ $$? -eq $(NOTHING_CHOSEN) ]

test-all: lint ## Every test; those that need a GPU skip themselves without one
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup ## Ruff and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Sort imports, mend what ruff can, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## Run one measurement: make bench NAME=...; without NAME, list them
	$(BIN)/python -m tests.benchmarks $(NAME) $(ARGS)

lock: setup ## Rewrite requirements.txt from what is installed, after changing dependencies by hand
	@{ sed -n '/^#/p;/^[^#]/q' requirements.txt; $(BIN)/python -m pip freeze --all --exclude-editable \
	  | grep -vE '^(pip|wheel)==' | sed -E 's/\+.*//'; } > requirements.new && mv requirements.new requirements.txt

clean: ## Remove caches and builds; keeps .venv and runs
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(PACKAGES) tests -type d -name __pycache__ -prune -exec rm -rf {} +
