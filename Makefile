# `make demo` from a fresh clone; everything else for those who change Quire.
# A .venv that exists is used. PYTHON= names the interpreter to make one with, VENV= its place.

VENV ?= .venv
PYTHON ?= $(shell scripts/find-python)
WORKERS ?= 2
BIN := $(VENV)/bin
# What an editable installation does not follow by itself: metadata and C++.
BUILT_FROM := pyproject.toml CMakeLists.txt $(wildcard kernels_cpu/csrc/*)

.PHONY: help demo serve test test-slow check format clean conformance-interpreted kernels
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 26

demo: $(VENV)/.installed-user ## install and let the demo model speak
	$(BIN)/quire demo

serve: $(VENV)/.installed-user ## an OpenAI-compatible server with the demo model
	$(BIN)/quire serve demo

test: $(VENV)/.installed-test ## the fast suite
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-slow: $(VENV)/.installed-test ## what takes longer
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

# Of one device: make conformance-interpreted BACKEND=rocm
BACKEND ?= cuda
LEVEL ?= 2
conformance-interpreted: $(VENV)/.installed-test ## the suite on BACKEND's kernels in Triton's interpreter, without a device
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/quire conformance run --backend $(BACKEND) --level $(LEVEL) -n $(WORKERS) --report build/conformance/$(BACKEND)
	$(BIN)/quire conformance verify build/conformance/$(BACKEND)/report.json

TABLES ?= $(wildcard kernels_cuda/tables/*.json kernels_rocm/tables/*.json)
kernels: $(VENV)/.installed-test ## compile every kernel for every architecture of TABLES
	TRITON_DEFAULT_FP_FUSION=1 $(BIN)/python -m quire.kernels_triton $(TABLES) --jobs $(WORKERS) --json docs/reports/kernels.json --page docs/kernels.md
	if command -v nvcc; then $(BIN)/python -m quire.kernels_cuda; else echo "no nvcc: CUDA C++ is left out"; fi

check: $(VENV)/.installed-test ## format, lint, types, architecture
	PATH="$(abspath $(BIN)):$$PATH" scripts/check

format: $(VENV)/.installed-test ## rewrite the files in the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what was built, not the virtual environment
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f $(VENV)/.installed-*

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-user: $(BUILT_FROM) | $(BIN)/python
	scripts/install $(VENV) cpu,serve
	@touch $@

$(VENV)/.installed-test: $(BUILT_FROM) | $(BIN)/python
	scripts/install $(VENV) test
	@touch $@ $(VENV)/.installed-user
