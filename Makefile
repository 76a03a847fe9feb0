SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
DEVICE ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed-$(DEVICE)
ARGS ?=

export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-fast test-slow conformance chaos check bench golden extras docs lock readme install

demo: install  ## every stage of the reviews task, from nothing
	$(BIN)/antiphon train examples/reviews/run.toml --fresh $(ARGS)

test: install  ## all tests but the slow ones, in two processes
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations=25 --durations-min=5 $(ARGS)

test-fast: install  ## tests without Ray, other processes or a browser: under a minute
	$(BIN)/python -m pytest --fast -n 2 --dist loadgroup --no-loadscope-reorder $(ARGS)

test-slow: install  ## trainings, whole commands and packaging: tests of more than 20 s each
	$(BIN)/python -m pytest -m 'slow and not chaos' -n 2 --dist loadgroup --no-loadscope-reorder --durations=25 $(ARGS)

conformance: install  ## our token ids against those of real tokenizers, and the table of it in docs/concepts/tokens.md
	$(BIN)/python -m pytest tests/conformance -m slow $(ARGS)
	$(BIN)/python -m tests.conformance.table

chaos: install  ## kill, hang or break parts of a run, for minutes
	$(BIN)/python -m pytest -m chaos $(ARGS)

check: install  ## style, types, floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_sizes.py

bench: install .venv-trl/installed  ## the README's figures, into benchmarks/results/ (ARGS=letters for one)
	$(BIN)/python -m benchmarks $(ARGS)
	$(BIN)/python -m benchmarks.tables

# The peer that Antiphon is measured against, in an environment of its own.
.venv-trl/installed: requirements/trl.txt
	test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	.venv-trl/bin/pip install --quiet --disable-pip-version-check --no-deps --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
	$(BIN)/uv pip install --quiet --python .venv-trl/bin/python --no-deps -r requirements/trl.txt
	touch $@

golden: .venv-trl/installed  ## the numbers of TRL that tests of [dpo] compare with
	.venv-trl/bin/python -P benchmarks/peer/trl_preferences.py tests/learner/supervised/trl_vectors.json

extras: install  ## packages of the tasks reasoning_gym and text_arena
	$(BIN)/uv pip install --quiet --no-deps -r requirements/extras.txt

docs: install  ## the documentation site, into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

readme: install  ## run the README's slow commands, then make its tables
	$(BIN)/python -m pytest tests/test_readme.py --readme-slow $(ARGS)
	$(BIN)/python -m benchmarks.tables

install: $(STAMP)

# CPU torch comes from PyTorch's own index (or a folder in PIP_FIND_LINKS), everything else from the package index.
$(STAMP): requirements/$(DEVICE).txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	if [ $(DEVICE) = cpu ] && ! $(BIN)/pip show torch 2>/dev/null | grep -q '^Version: 2.13.0+cpu'; then \
	  $(BIN)/pip install --quiet --no-deps --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu; fi
	$(BIN)/uv pip install --quiet --no-deps --compile-bytecode -r requirements/$(DEVICE).txt
	$(BIN)/uv pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

lock: ## pin what pyproject.toml asks for
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	UV_FIND_LINKS="$$PIP_FIND_LINKS" $(BIN)/uv pip compile --quiet --no-header --no-annotate --python-version 3.11 \
	  --override requirements/cpu-overrides.txt --extra cpu --extra examples --extra dev $(if $(PIP_FIND_LINKS),,--extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match --no-emit-index-url) pyproject.toml -o requirements/cpu.txt
	$(BIN)/uv pip compile --quiet --no-header --no-annotate --python-version 3.11 --extra gpu --extra examples --extra dev pyproject.toml -o requirements/gpu.txt
