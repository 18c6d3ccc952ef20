# SPDX-License-Identifier: Apache-2.0
# make quickstart | test | lint | bench | clean : each does its own set-up in .venv.
# PYTHON=python3.12      the interpreter that .venv is made with
# NO_VENV=1              use PYTHON as it is (a machine without a package index)
# TEST_ARGS="-k camera"  more for pytest;  QUICKSTART_ARGS, BENCH_ARGS likewise;  JOBS=2 test processes

PYTHON ?= python3
TEST_ARGS ?=
QUICKSTART_ARGS ?=
BENCH_ARGS ?=
JOBS ?= 2

export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

ifdef NO_VENV
PY := $(PYTHON)
setup = @$(PYTHON) -c 'import sys; sys.exit("error: facelab needs Python 3.10 or newer; name another one with PYTHON=") if sys.version_info < (3, 10) else None'
else
PY := .venv/bin/python
setup = @$(PYTHON) .ci/make_venv.py $(1)
endif

.PHONY: help quickstart test lint format bench clean

help:
	@sed -n '2,6s/^# //p' Makefile

quickstart:
	$(call setup)
	@$(PY) scripts/quickstart.py $(QUICKSTART_ARGS)

test:
	$(call setup,dev)
	@if $(PY) -c 'import xdist' 2>/dev/null; then workers='-n $(JOBS)'; fi; \
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest $$workers $(TEST_ARGS)

lint:
	$(call setup,dev)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) .ci/check_files.py
	@$(PY) -m pyright --pythonpath $(PY)

format:
	$(call setup,dev)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench:
	$(call setup,dev)
	@failed=; for file in tests/benchmarks/bench_*.py; do echo "$$file"; $(PY) $$file $(BENCH_ARGS) || failed="$$failed $$file"; done; \
	if [ -n "$$failed" ]; then echo "did not run to their end (some need a GPU or --data):$$failed" >&2; exit 1; fi

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
