# Everything that a contributor, a drill and the CI need. `make` alone says what there is.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LAB := $(BIN)/python tests/lab/lab
export PATH := $(CURDIR)/$(BIN):$(PATH)
export ANSIBLE_COLLECTIONS_PATH := $(CURDIR)/collections
# Deployment runs several pip processes for other hosts; none of them needs to look for a newer pip.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The system's certificates, as pip and apt use them.
export UV_NATIVE_TLS := 1

# Debian's packages that a target needs: the network is asked only when one of them is missing.
install = dpkg -s $(1) >/dev/null 2>&1 || \
  { apt-get -q update && apt-get -q -y install --no-install-recommends $(1); }

FILESYSTEM_PACKAGES := btrfs-progs e2fsprogs mount util-linux xfsprogs
SOAK_PACKAGES := dpkg fsmark git stress-ng
POSTGRES_PACKAGES := postgresql postgresql-contrib
TEST_PACKAGES := $(sort $(FILESYSTEM_PACKAGES) $(SOAK_PACKAGES) $(POSTGRES_PACKAGES) rsync)
BENCH_PACKAGES := btrfs-progs iperf3 iproute2 lsyncd rdiff rsync syncthing time util-linux xfsprogs

.PHONY: help
help: ## What there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16

.PHONY: setup
setup: $(VENV)/.ready ## The virtual environment with the command farshore and all tools

$(VENV)/.ready: tests/requirements.txt agent/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed; set PYTHON=/path/to/it'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { apt-get -q update && apt-get -q -y install --no-install-recommends python3-venv; }
	@echo "Setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet uv==0.9.30
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r tests/requirements.txt -e './agent[node,gateway,mirror]'
	@touch $@

.PHONY: lab-deps
lab-deps: setup
	@$(LAB) deps

.PHONY: drill
drill: setup lab-deps ## A whole disaster on the lab's hosts; writes build/drill/report.json and report.html
	@$(BIN)/python tests/drill/run.py

.PHONY: test
test: setup lab-deps ## All checks and all tests
	@$(call install,$(TEST_PACKAGES))
	@mkdir -p build
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest

.PHONY: lint
lint: setup ## ruff, mypy, ansible-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy agent/src
	$(BIN)/mypy tests/lab
	$(BIN)/mypy --strict bench
	$(BIN)/ansible-lint

.PHONY: unit
unit: setup ## The tests that need no hosts
	$(BIN)/python -m pytest -m 'not lab'

.PHONY: molecule
molecule: setup lab-deps ## The collection's roles on the lab's hosts
	$(BIN)/molecule test

.PHONY: lab-up lab-down
lab-up: lab-deps ## The lab's hosts, to play with: see tests/lab/README.md
	@$(LAB) up

lab-down: setup ## Remove the lab's hosts
	@$(LAB) down

.PHONY: bench-deps
bench-deps: setup $(VENV)/.bench

$(VENV)/.bench: bench/requirements.txt $(VENV)/.ready
	@$(call install,$(BENCH_PACKAGES))
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r bench/requirements.txt
	@touch $@

.PHONY: bench bench-quick
bench: bench-deps lab-deps ## All benchmarks beside their peers, up to an hour; writes build/bench/
	@$(BIN)/python -m bench

bench-quick: bench-deps ## Rows 1 to 7 in about ten minutes
	@$(BIN)/python -m bench --quick

.PHONY: crash
crash: setup ## Kill both nodes a thousand times while files change, in at most 40 minutes; writes build/crash/report.json
	@$(BIN)/python agent/tests/crash.py --kills 1000 --minutes 40 --report build/crash/report.json

FUZZ_MINUTES ?= 5

.PHONY: fuzz
fuzz: setup ## Lies, links and bytes for a node, FUZZ_MINUTES=5 of them; writes build/fuzz/report.json
	@$(BIN)/python agent/tests/hostile.py --minutes $(FUZZ_MINUTES) --report build/fuzz/report.json

.PHONY: powerloss
powerloss: setup ## Cut the power of both machines' disks 200 times, in at most 30 minutes; writes build/powerloss/report.json
	@$(call install,$(FILESYSTEM_PACKAGES))
	@$(BIN)/python agent/tests/powerloss.py --cuts 200 --minutes 30 --report build/powerloss/report.json

SOAK_MINUTES ?= 60

.PHONY: soak
soak: setup ## Programs at work in a protected tree, SOAK_MINUTES=60 of them; writes build/soak/report.json
	@$(call install,$(SOAK_PACKAGES))
	@$(BIN)/python agent/tests/soak.py --minutes $(SOAK_MINUTES) --report build/soak/report.json

.PHONY: postgres-rehearsal
postgres-rehearsal: setup ## Kill PostgreSQL and its node under load, N=20 times, and go on; writes build/postgres/report.json
	@$(call install,$(POSTGRES_PACKAGES) $(FILESYSTEM_PACKAGES))
	@$(BIN)/python agent/tests/rehearsal_postgres.py --failovers $(or $(N),20) --report build/postgres/report.json

.PHONY: build
build: setup ## The collection's tarball, in build/
	@mkdir -p build
	@$(BIN)/ansible-galaxy collection build --force --output-path build

.PHONY: clean
clean: ## Remove what was built here; caches outside of the checkout stay
	rm -rf build $(VENV) agent/src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .ansible
