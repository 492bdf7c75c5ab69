# Two commands on a fresh Debian with python3, make and gcc; both do all their own set-up:
#   make demo   train a small Llama plain and under 40 % of its memory, compare them bit by bit
#   make test   lint, types, import rules, tests and every example
# Others: make setup (the environment of `make test`), make lint, make format, make clean.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What decides the contents of the environment; the native part is built at installation.
INPUTS := Makefile pyproject.toml constraints.txt $(wildcard setup.py MANIFEST.in csrc/io/*)
# 1: a native part that cannot be built is a failure of `make test`, not a skip.
REQUIRE_NATIVE ?= 1
TEST_WORKERS ?= 2

# The CUDA kernels are built, and then required by the tests, where there is an nvcc.
NVCC := $(firstword $(wildcard $(or $(CUDA_HOME),/usr/local/cuda)/bin/nvcc) $(shell command -v nvcc))
KERNELS := $(if $(NVCC),.native/libmemopt_cuda.so)

.PHONY: help demo test lint format setup clean
help:
	@sed -n '1,4p' Makefile | sed 's/^# \?//'

# System packages: asked of apt only where something is missing, installed only as root.
$(VENV)/.system: Makefile
	@need=(); \
	command -v gcc >/dev/null || need+=(gcc libc6-dev); \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || need+=(python3-venv); \
	$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || need+=(python3-dev); \
	echo '#include <liburing.h>' | gcc -E -x c - >/dev/null 2>&1 || need+=(liburing-dev); \
	if [ $${#need[@]} -gt 0 ]; then \
	  echo "missing system packages: $${need[*]}"; \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$${need[@]}"; \
	  elif [[ " $${need[*]} " == *" python3-venv "* ]]; then \
	    echo "install them, then run make again: sudo apt-get install $${need[*]}" >&2; exit 1; \
	  else \
	    echo "going on without the io_uring engine (make test then needs REQUIRE_NATIVE=0); better: sudo apt-get install $${need[*]}" >&2; \
	  fi; \
	fi
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@touch $@

# torch is installed alone and first: nothing that follows may choose another one.
$(VENV)/.torch: $(VENV)/.system constraints.txt
	$(PIP) install -q $$(grep -E '^torch==' constraints.txt) -c constraints.txt
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(INPUTS)
	$(PIP) install -q -e '.[demo]' -c constraints.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(INPUTS)
	MEMOPT_REQUIRE_NATIVE=$(REQUIRE_NATIVE) $(PIP) install -q -e '.[dev]' -c constraints.txt
	@touch $@ $(VENV)/.demo

.native/libmemopt_cuda.so: tools/build_cuda.py $(wildcard csrc/cuda/* csrc/torch/*) | $(VENV)/.torch
	$(BIN)/python tools/build_cuda.py

setup: $(VENV)/.dev $(KERNELS)

demo: $(VENV)/.demo
	$(BIN)/memopt demo --output demo_out

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The tests' tensors are small: one thread is as fast as several, and steadier; so two processes run them.
test: lint $(KERNELS)
	MEMOPT_REQUIRE_NATIVE=$(REQUIRE_NATIVE) MEMOPT_REQUIRE_CUDA=$(if $(KERNELS),1,0) OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

clean:
	rm -rf build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo_out
	find memopt -name '*.so' -delete
