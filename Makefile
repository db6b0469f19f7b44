# `make demo` and `make test` do all the set-up: a virtual environment in .venv with the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?= -n auto

# Triton for a build of torch that brings none (CPU builds): the templates are compiled and interpreted without a GPU.
TRITON := triton==3.6.0

# One thread a worker: the cores are shared out among pytest's workers, not within one.
TEST_ENV := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help demo test lint compiler clean

help:
	@echo "make demo   compress the bundled video model and show what it costs and gains"
	@echo "make test   the test suite (no GPU needed)"
	@echo "make lint   ruff, mypy, codespell, validate-pyproject"
	@echo "make clean  remove the virtual environment and build leftovers"

demo: compiler $(VENV)/ready
	$(BIN)/quantsparse demo

test: compiler $(VENV)/ready
	$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/validate-pyproject pyproject.toml

$(VENV)/ready: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "qs_compiler needs Python 3.11 or later; name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation \
	    --group dev --editable '.[diffusers,demo,eval]'
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet $(TRITON)
	@touch $@

# Inductor compiles C++ against Python's headers with OpenMP at run time; a missing piece would show up late and unclear.
compiler:
	@include=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))') && \
	printf '#include <Python.h>\n#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n' | \
	$(CXX) -x c++ -fopenmp -fsyntax-only -I"$$include" - 2>/dev/null || { \
	    echo "No working C++ compiler: '$(CXX)' cannot compile against Python.h and omp.h."; \
	    echo "Inductor needs one to compile for the CPU. Install it, then run make again:"; \
	    echo "  Debian, Ubuntu    apt-get install g++ python3-dev"; \
	    echo "  Fedora, RHEL      dnf install gcc-c++ python3-devel"; \
	    echo "  openSUSE          zypper install gcc-c++ python3-devel"; \
	    echo "or name another one: make CXX=clang++"; exit 1; }

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
