# Every target does its own set-up. The environment is .venv, or the one VENV names.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Packages for the build itself: the editable install uses the environment's torch instead of fetching a second one.
BUILD := "setuptools>=77" "torch>=2.10" ninja "pybind11>=2.13" numpy
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*) setup.py pyproject.toml
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)

.PHONY: help train test test-slow lint format bench bench-check doctor clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Rebuilt when a source of the extension changes.
$(VENV)/.installed: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(BUILD)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[dev]"
	touch $@

train: $(VENV)/.installed  ## train on long-tailed digits with two losses and compare them
	$(BIN)/classfair train $(ARGS)

test: $(VENV)/.installed  ## run the tests
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed  ## run the proofs that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.installed  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.installed  ## rewrite sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/.installed  ## time every back-end beside torch, write benchmarks/results
	$(BIN)/python -m benchmarks.run $(ARGS)

bench-check: $(VENV)/.installed  ## compare this machine's ratios to torch with the committed ones
	$(BIN)/python -m benchmarks.check $(ARGS)

doctor: $(VENV)/.installed  ## show versions and back-ends, and test them
	$(BIN)/classfair doctor

clean:  ## remove what was built
	rm -rf build dist *.egg-info classfair/*.so $(VENV)/.installed
