PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# The threads of the tests' processes and of the tiny model: more than one each only gets in the way on a small machine.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test check compare bench clean

help:
	@echo "make demo     watch a small model improve itself by on-policy self-distillation"
	@echo "make test     formatting, lint, types and tests"
	@echo "make compare  OPSD beside supervised fine-tuning on the small model: several seeds, about half an hour"
	@echo "make bench    the loss beside its peers, at small sizes on a CPU and full ones on a GPU"
	@echo "make clean    remove the virtual environment"

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

compare: $(VENV)/dev
	$(BIN)/python -m benchmarks.learning

bench: $(VENV)/dev
	env -u OMP_NUM_THREADS $(BIN)/python -m pytest benchmarks

clean:
	rm -rf $(VENV)
