# everything runs in .venv, made on first use. a machine with a GPU: `make TORCH=torch` takes PyTorch's CUDA build
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test bench gpu lint wheel clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# torch first, alone: the extension is built against it
$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja
	touch $@

SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

$(VENV)/install.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation -e ".[dev]"
	touch $@

demo: $(VENV)/install.stamp ## the log-probability op against plain PyTorch: time, memory, a plot
	$(BIN)/python -m bench.demo

test: $(VENV)/install.stamp ## installs, then runs every test
	$(BIN)/python -m pytest

lint: $(VENV)/install.stamp ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(VENV)/torch.stamp ## dist/*.whl with what this machine can build
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps -w dist .

clean: ## removes what was built
	rm -rf build dist *.egg-info prism_kernels/*.so
