# Everything that people and CI run. Needs Python 3.11, make and pip; each target makes the environment that it uses.
# `test-py312` needs Python 3.12 instead; CI does not run it.
#
# The first call installs several GB: the full stack holds the CUDA build of torch 2.4.1. `test-latest` takes torch
# 2.13.0 from wherever pip finds it; for a build without CUDA (some 200 MB instead of several GB) set PIP_FIND_LINKS or
# PIP_EXTRA_INDEX_URL to a place that has one. pip reads every other PIP_* variable as well.

SHELL := /bin/sh
.DEFAULT_GOAL := help

# The first Python 3.11 on the path; if there is none, python3, which setup_env.py refuses with a message.
PYTHON ?= $(shell for p in python3.11 python3 python; do \
    $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
PYTHON312 ?= $(shell for p in python3.12 python3 python; do \
    $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && { echo $$p; exit; }; done; echo python3.12)
VENV ?= .venv
VENV_312 ?= .venv-py312
VENV_LATEST ?= .venv-latest
VENV_LINT ?= .venv-lint
JOBS ?= 2
PYTEST_FLAGS ?=
DEMO_FLAGS ?= --out runs/demo

FULL := constraints/full-py311.txt
LATEST := constraints/latest-torch-py311.txt
MODERN := constraints/modern-py312.txt
READY := ndem_zoo-installed
FULL_EXTRAS := .[full,xtb,docs,dev]
# The extras of `full` but SchNetPack, which does not import beside this torch; torchmd-net is for the parity test.
LATEST_EXTRAS := .[dgl,chem,deepchem,oc20,cli,plots,tensorboard,xtb,dev]
# The extras of `full` but DeepChem, which has no release for Python 3.12.
MODERN_EXTRAS := .[schnetpack,dgl,chem,oc20,cli,plots,tensorboard,dev]

# $(call set-up,environment,constraints,requirements,GB,variable that names the Python,its version)
set-up = @$($(5)) -c "" >/dev/null 2>&1 || { echo "set-up of $(1) failed: Python $(6) is needed, and there is no \
$($(5)); install it, or name it: make $(5)=/path/to/python$(6)" >&2; exit 1; }; \
    $($(5)) scripts/setup_env.py $(1) $(2) --disk $(4) --python $(6) --variable $(5) $(3)

# One thread a test process: with more, processes on the same cores only wait for each other.
pytest = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 DGLBACKEND=pytorch $(1)/bin/python -m pytest -n $(JOBS) -q $(PYTEST_FLAGS)

.PHONY: help demo test test-latest test-py312 lint format docs notebooks bench bench-quick reliability gpu-check setup setup-latest \
    setup-py312 clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/$(READY)  ## Train, compare, report and run MD on the embedded ethanol frames (no download)
	$(VENV)/bin/python -m ndem_zoo.demo $(DEMO_FLAGS)

test: $(VENV)/$(READY)  ## Run all tests in the full stack (torch 2.4.1)
	$(call pytest,$(VENV))

test-latest: $(VENV_LATEST)/$(READY)  ## Run the core tests with the newest torch (2.13.0)
	$(call pytest,$(VENV_LATEST)) -m "not schnetpack"

test-py312: $(VENV_312)/$(READY)  ## Run all tests but DeepChem's with Python 3.12, SchNetPack 2.2 and torch 2.15.0 (not in CI)
	$(call pytest,$(VENV_312)) -m "not deepchem"

lint: $(VENV_LINT)/$(READY)  ## Check style and format
	$(VENV_LINT)/bin/ruff check .
	$(VENV_LINT)/bin/ruff format --check .

format: $(VENV_LINT)/$(READY)  ## Mend what can be mended of style and format
	$(VENV_LINT)/bin/ruff check --fix .
	$(VENV_LINT)/bin/ruff format .

docs: $(VENV)/$(READY)  ## Build the documentation; a warning is an error
	$(VENV)/bin/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

notebooks: $(VENV)/$(READY)  ## Turn quickstart and tutorials into notebooks for Colab and the like
	$(VENV)/bin/python scripts/make_notebooks.py

# Benchmarks are the scripts benchmarks/<group>/bench_*.py; each writes its JSON and table beside itself. Those of speed
# run beside the newest torch and their rivals, the others in the full stack. BENCH_FLAGS go to every script.
BENCH ?= $(sort $(wildcard benchmarks/*/bench_*.py))
BENCH_FLAGS ?=
bench-speed := $(filter benchmarks/speed/%,$(BENCH))
bench-other := $(filter-out benchmarks/speed/%,$(BENCH))

bench: $(if $(bench-other),$(VENV)/$(READY)) $(if $(bench-speed),$(VENV_LATEST)/$(READY))  ## Run every benchmark (hours); one of them: make bench BENCH=benchmarks/speed/bench_speed.py
	@test -n "$(BENCH)" || { echo "there is no benchmarks/*/bench_*.py" >&2; exit 1; }
	$(if $(bench-speed),$(VENV_LATEST)/bin/python -m pip install -q -c $(LATEST) -r benchmarks/speed/requirements.txt)
	@for script in $(bench-other); do echo "== $$script"; $(VENV)/bin/python $$script $(BENCH_FLAGS) || exit 1; done
	@for script in $(bench-speed); do echo "== $$script"; $(VENV_LATEST)/bin/python $$script $(BENCH_FLAGS) || exit 1; done

bench-quick: $(VENV_LATEST)/$(READY)  ## Run the speed benchmark in its reduced form (minutes)
	$(MAKE) bench BENCH=benchmarks/speed/bench_speed.py BENCH_FLAGS=--quick

RELIABILITY_FLAGS ?= --out runs/reliability

reliability: $(VENV)/$(READY)  ## Kill, fill, damage, spoil and run on for long what can be (see benchmarks/reliability)
	$(VENV)/bin/python -m benchmarks.reliability $(RELIABILITY_FLAGS)

# With GPU_PYTHON=python the check uses an environment of yours instead of making one.
gpu-check: $(if $(GPU_PYTHON),,$(VENV)/$(READY))  ## Run the tests and the CPU/GPU comparison on a CUDA device
	$(or $(GPU_PYTHON),$(VENV)/bin/python) -m benchmarks.gpu_check

setup: $(VENV)/$(READY)  ## Make the environment of demo, test and docs only
setup-latest: $(VENV_LATEST)/$(READY)  ## Make the environment of test-latest only
setup-py312: $(VENV_312)/$(READY)  ## Make the environment of test-py312 only

$(VENV)/$(READY): setup.py $(FULL) scripts/setup_env.py
	$(call set-up,$(VENV),$(FULL),'$(FULL_EXTRAS)',10,PYTHON,3.11)

$(VENV_LATEST)/$(READY): setup.py $(LATEST) scripts/setup_env.py
	$(call set-up,$(VENV_LATEST),$(LATEST),'$(LATEST_EXTRAS)' torchmd-net 'setuptools>=82',4,PYTHON,3.11)

$(VENV_312)/$(READY): setup.py $(MODERN) scripts/setup_env.py
	$(call set-up,$(VENV_312),$(MODERN),'$(MODERN_EXTRAS)' 'setuptools>=82',10,PYTHON312,3.12)

$(VENV_LINT)/$(READY): $(FULL) scripts/setup_env.py
	$(call set-up,$(VENV_LINT),$(FULL),ruff,0.1,PYTHON,3.11)

clean:  ## Remove environments, runs, caches and built pages
	rm -rf .venv .venv-latest .venv-py312 .venv-lint .venv*.log .venv*.lock runs notebooks build dist *.egg-info
	rm -rf docs/_build docs/jupyter_execute
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
