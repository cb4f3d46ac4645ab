# `make quickstart` and the tests do all the set-up themselves.
# Another interpreter: `make test PYTHON=python3.12` (it gets an environment of its own).

PYTHON ?= python3
VENV := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Tests of one file go to one process, which compiles what they share once.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile
FAST := $(addprefix tests/,algo rollout learner config test_imports.py)

.PHONY: help quickstart test test-all test-fast check torture fuzz benchmark clean

help:
	@echo "make quickstart  install, then train SFT, reward model and PPO on short reviews"
	@echo "make test        install, then lint, types and the tests but for long scripts"
	@echo "make test-all    the same with every test, as before a release"
	@echo "make test-fast   install, then the tests of the formulas, in two minutes"
	@echo "make check       lint and types only"
	@echo "make torture     install, then kill runs of every stage, and break them, for an hour"
	@echo "make fuzz        install, then random inputs for every reader of files; ARGS=--help"
	@echo "make benchmark   install, then the GAE and whole-update benchmarks"
	@echo "make clean       remove environments and caches"

quickstart: $(VENV)/installed
	$(BIN)/rlhf-jax quickstart $(ARGS)

test: check
	$(PYTEST) -m 'not slow' $(ARGS)

test-all: check
	$(PYTEST) $(ARGS)

test-fast: $(VENV)/installed-test
	$(PYTEST) -m 'not slow' $(FAST) $(ARGS)

check: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

torture: $(VENV)/installed-test
	$(BIN)/python tests/torture/run.py $(ARGS)
	$(BIN)/python tests/torture/faults.py
	$(BIN)/python tests/torture/endurance.py

fuzz: $(VENV)/installed-fuzz
	$(BIN)/python tests/fuzz/run_fuzz.py $(ARGS)

benchmark: $(VENV)/installed-bench
	$(BIN)/python benchmarks/gae.py
	$(BIN)/python benchmarks/ppo_update.py

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	  "rlhf-jax needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + \
	  ". Try: make $(MAKECMDGOALS) PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: pyproject.toml | $(VENV)/created
	$(PIP) --editable .
	touch $@

$(VENV)/installed-test: pyproject.toml | $(VENV)/created
	$(PIP) --editable '.[test]'
	touch $@ $(VENV)/installed

$(VENV)/installed-fuzz: pyproject.toml | $(VENV)/created
	$(PIP) --editable '.[test,fuzz]'
	touch $@ $(VENV)/installed $(VENV)/installed-test

$(VENV)/installed-bench: pyproject.toml | $(VENV)/created
	$(PIP) --editable '.[bench]'
	touch $@ $(VENV)/installed

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
