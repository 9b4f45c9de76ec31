# `make help` lists the targets. Each makes the environment it needs: Python 3.11+, git, make and the package
# index are enough. Another interpreter: `make test PYTHON=python3.13`; arguments: `make test ARGS="-k wake"`.

.DEFAULT_GOAL := help
.SUFFIXES:
.DELETE_ON_ERROR:

ARGS ?=
BENCH_ARGS ?= $(ARGS)

# The first interpreter that is new enough. Run, not only looked for: a version manager's shim may be on PATH and
# refuse to run. The tag has the micro version (an environment does not survive its interpreter) and the ABI's
# letters (3.13.0t is the free-threaded build).
TAG_OF := import sys; v = sys.version_info; \
	v >= (3, 11) and print("%d.%d.%d" % v[:3] + sys.__dict__.get("abiflags", ""))
ifeq ($(origin PYTHON),undefined)
  PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	[ -n "$$($$p -c '$(TAG_OF)' 2>/dev/null)" ] && echo $$p && break; done)
endif
TAG := $(if $(PYTHON),$(shell $(PYTHON) -c '$(TAG_OF)' 2>/dev/null))
VENV := .venv-$(or $(TAG),none)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS_READY := $(VENV)/.peers-ready
DOCS_READY := $(VENV)/.docs-ready

PIP_ENV := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

.PHONY: help test conformance peers check lint types tidy demo docs bench env clean

help:
	@echo 'make test    all tests                         ARGS="-k wake -x"   for pytest'
	@echo 'make conformance  CPython'"'"'s own asyncio tests on our loop (make test runs a few of them)'
	@echo 'make peers   the suites of anyio, uvicorn, aiohttp on our loop   ARGS="--only anyio"  (many minutes)'
	@echo 'make check   ruff, mypy --strict, our own rules (tests/test_tidy.py), the reference'
	@echo 'make demo    a disk image, served to a real client  ARGS="--help"  for the demo'
	@echo 'make docs    the documents and the reference in build/docs; warnings are errors'
	@echo 'make bench   side by side with its peers       ARGS="--quick"      for the benchmark'
	@echo 'make env     only the environment of these     PYTHON=python3.13   another interpreter, for each'
	@echo 'make clean   removes the environments and what the tools left behind'

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

conformance: $(READY)
	HOMELOOP_CONFORMANCE=1 $(BIN)/python -m pytest tests/conformance $(ARGS)

peers: $(READY)
	$(BIN)/python -m tests.peers.runner $(ARGS)

check: lint types tidy

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

tidy: $(READY)
	$(BIN)/python -m pytest -q tests/test_tidy.py tests/test_reference.py tests/test_rules_page.py

demo: $(READY)
	$(BIN)/homeloop demo $(ARGS)

# Not with --quiet: mkdocs does not count the warnings then that it does not print.
docs: $(DOCS_READY)
	$(BIN)/python -m mkdocs build $(ARGS)
	@echo 'built build/docs/index.html'

bench: $(PEERS_READY)
	$(BIN)/python -m bench $(BENCH_ARGS)

env: $(READY)

clean:
	rm -rf .venv-* .peers build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name .git -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

# Made anew when pyproject.toml changes: what it no longer names must not linger. The stamp is written last, so
# that a build that failed is made again.
$(READY): pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
		echo 'homeloop needs Python 3.11 or newer: none of python3, python3.14 to python3.11 on PATH is.' >&2; \
		echo 'Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12' >&2; exit 1; fi
	@if [ -z "$(TAG)" ]; then \
		echo 'homeloop needs Python 3.11 or newer; PYTHON=$(PYTHON) is:' >&2; \
		$(PYTHON) --version >&2; exit 1; fi
	@echo "making $(VENV) with $(PYTHON) ..."
	@sh .ci/make-venv "$(PYTHON)" "$(VENV)"
	@$(PIP_ENV) $(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

$(DOCS_READY): $(READY)
	@$(PIP_ENV) $(BIN)/python -m pip install --quiet --editable '.[dev,docs]'
	@touch $@

# A peer that cannot be installed here is named as missing by the benchmark; it does not stop it.
$(PEERS_READY): $(READY)
	@$(PIP_ENV) $(BIN)/python -m pip install --quiet --editable '.[dev,bench]' \
		|| echo 'some peers could not be installed; the benchmark runs without them' >&2
	@touch $@
