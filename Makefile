# everything runs in .venv, which the first target creates. with a GPU, `make TORCH=torch` takes PyTorch's CUDA build
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help demo demo-op reproduce test test-all test-real fuzz test-peers bench bench-kept bench-patches gpu lint wheel \
	clean

help: ## lists the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# torch comes first: the extension is built against it
$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja
	touch $@

SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

$(VENV)/install.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation -e ".[dev,train]"
	touch $@

# another number of threads would sum in another order and give other figures
demo: export OMP_NUM_THREADS := 2
demo: $(VENV)/install.stamp ## trains a tiny model through all stages in minutes and writes a report; rerun to resume
	$(BIN)/python -m prism run --config configs/tiny.toml --run.folder $(DEMO)
	$(BIN)/python -m prism report --run $(DEMO)

demo-op: $(VENV)/install.stamp ## compares the log-probability op with plain PyTorch: time, memory, a plot
	$(BIN)/python -m bench.demo

reproduce: $(VENV)/install.stamp ## runs the experiment: each arm on three seeds, figures, plots, a page; rerun to resume
	$(BIN)/python -m bench.reproduce

# two workers of one thread each; the tests of a file stay together, since they share what is slow to make
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/install.stamp ## installs everything and runs the tests
	$(PYTEST) -m "not full"

test-all: $(VENV)/install.stamp ## runs the tests with the whole of every grid
	$(PYTEST)

# one process: it starts the runs, two at a time
test-real: $(VENV)/install.stamp ## trains a small Qwen3-VL in the form of a published one; stops, resumes, compares
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/real --durations=5

# half of SECONDS for each pass. ASan must find libstdc++ when it starts, to see exceptions; Python leaks at its end
SECONDS := 120
FUZZ := FUZZ_SECONDS=$$(($(SECONDS) / 2)) OMP_NUM_THREADS=1
ASAN := build/asan

fuzz: $(VENV)/install.stamp ## tries random and damaged inputs for SECONDS=120, then again under AddressSanitizer
	$(FUZZ) $(BIN)/python -m pytest tests/fuzz -s --hypothesis-profile fuzz
	PRISM_KERNELS_SANITIZE=address PRISM_KERNELS_CUDA=0 PRISM_KERNELS_REQUIRE=1 \
		$(BIN)/python setup.py -q build --build-base $(ASAN) --build-lib $(ASAN)/lib
	$(FUZZ) ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so.6)" \
		$(BIN)/python -m pytest tests/fuzz/test_ops.py tests/fuzz/test_native.py -s -p no:faulthandler \
		-o pythonpath=$(ASAN)/lib

# the peers get their own environment: they pin other versions than the package needs
PEERS := .venv-peers

$(PEERS)/install.stamp: $(SOURCES) bench/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --upgrade pip
	$(PEERS)/bin/pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja
	$(PEERS)/bin/pip install --quiet -r bench/peers.txt
	$(PEERS)/bin/pip install --quiet --no-deps verl==0.9.1
	$(PEERS)/bin/pip install --quiet --no-build-isolation -e ".[bench]"
	touch $@

# TRL with the transformers version of the trainer. the native code is already built in place, for this torch
TRL := .venv-trl

$(TRL)/install.stamp: pyproject.toml tests/peers/trl.txt | $(PEERS)/install.stamp
	$(PYTHON) -m venv $(TRL)
	$(TRL)/bin/pip install --quiet --upgrade pip
	$(TRL)/bin/pip install --quiet "$(TORCH)" "setuptools>=77" wheel
	PRISM_KERNELS_SKIP_BUILD=1 $(TRL)/bin/pip install --quiet --no-build-isolation -e ".[train]" -r tests/peers/trl.txt
	touch $@

test-peers: $(PEERS)/install.stamp $(TRL)/install.stamp ## compares with TRL's and verl's own functions, each in its environment
	$(PEERS)/bin/python -m pytest tests/peers/test_verl.py tests/peers/test_verl_patch.py \
		tests/peers/test_verl_one_pass.py
	$(TRL)/bin/python -m pytest tests/peers/test_trl.py tests/peers/test_trl_patch.py tests/peers/test_trl_step.py \
		tests/peers/test_trl_losses.py tests/peers/test_openrlhf_patch.py

bench: $(PEERS)/install.stamp ## measures time and memory beside PyTorch, TRL and verl; writes JSON, plots and the pages' tables
	$(PEERS)/bin/python -m pytest bench -W ignore --benchmark-columns=median,rounds
	$(PEERS)/bin/python -m bench.plot
	$(PEERS)/bin/python -m bench.tables

# malloc keeps freed memory, so no time goes into the first touch of fresh memory
bench-kept: export GLIBC_TUNABLES := glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184
bench-kept: $(PEERS)/install.stamp ## measures the log-probability ops with a malloc that keeps freed memory
	$(PEERS)/bin/python -m pytest bench/test_linear_logprob.py bench/test_token_logprob.py -W ignore
	$(PEERS)/bin/python -m bench.tables

bench-patches: $(PEERS)/install.stamp $(TRL)/install.stamp ## measures trainers before and after our patch, for docs/migrating.md
	$(TRL)/bin/python -m bench.end_to_end.trl_patch
	$(TRL)/bin/python -m bench.end_to_end.head_patch --trainer transformers
	$(TRL)/bin/python -m bench.end_to_end.head_patch --trainer openrlhf
	$(PEERS)/bin/python -m bench.end_to_end.head_patch --trainer verl
	$(PEERS)/bin/python -m bench.tables

# installs nothing: a GPU machine often has its own torch and no network
gpu: ## on a GPU machine: builds in place, tests, measures, tunes; writes JSON to $$OUT or bench/results
	$(PYTHON) -m bench.gpu

lint: $(VENV)/install.stamp ## runs ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(VENV)/torch.stamp ## builds dist/*.whl with the native code that this machine can build
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps -w dist .

clean: ## removes built files
	rm -rf build dist *.egg-info prism_kernels/*.so
