# Each target sets up what it needs by itself: the system libraries, `.venv` with everything pinned, and the compiled
# kernels. The first run takes some minutes; later ones start at once.
#   make PYTHON=python3.12 test     another interpreter (3.11 or newer)
#   make serve ARGS="--port 9000"   options for the command that the target runs (here: pem serve --port 9000)

PYTHON ?= python3.11
ARGS ?=
PARALLEL ?= --numprocesses 3 --dist loadfile
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV := $(VENV)/.ready-dev
KERNELS := $(wildcard pointnet2_ext/csrc/* posekit/*/csrc/*)
PEERS := .venv-peers
BENCHMARKS := accuracy kernels.points kernels.geometric service.gateway_overhead service.fairness service.overload
PACKAGES := client serve workers posekit pointnet2_ext

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup system demo serve test test-slow test-long lint check bench bench-accuracy bench-network \
	bench-throughput peers peers-serving clean

help: ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS='	' read -r name text; do printf '  make %-14s %s\n' "$$name" "$$text"; done

setup: $(READY) ## Prepare .venv and the system libraries, nothing else

demo: $(READY) ## Start a server, estimate a pose in a synthetic scene, compare it with the truth
	@$(BIN)/pem demo $(ARGS)

serve: $(READY) ## Run the server on http://127.0.0.1:8003 (Ctrl-C drains and stops it)
	@$(BIN)/pem serve $(ARGS)

test: $(DEV) $(VENV)/.test-programs ## Run the tests: everything that guards behaviour (five to seven minutes on two idle cores)
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-slow: $(DEV) $(VENV)/.test-programs $(PEERS)/.serving ## Run the slow ones: faults, soaks, parity, peers, builds (20 minutes at most)
	@$(BIN)/python -m pytest -m slow $(ARGS)

test-long: $(DEV) $(VENV)/.test-programs ## Run those that take hours, by hand: long soaks, long fuzzing
	@PEM_TEST_EXAMPLES=100 $(BIN)/python -m pytest -m "long or hypothesis" $(ARGS)

lint: $(DEV) ## Check formatting, style and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/mypy --python-version 3.10 --package pem

check: lint test ## Check what every commit must hold: lint, then test

bench: $(READY) ## Run the main benchmarks (minutes)
	@set -e; for name in $(BENCHMARKS); do echo "== python -m benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name $(ARGS); done

bench-accuracy: $(READY) $(PEERS)/.ready ## Measure the engine beside its peers: accuracy, confidence, seconds (about six minutes)
	@$(BIN)/python -m benchmarks.accuracy --http --wrong-objects --tracking --real --peers open3d,opencv \
		--page build/accuracy --json build/accuracy.json $(ARGS)

bench-network: $(READY) ## Compare the network with the original's numbers, then time its fast setting beside the exact one
	@$(BIN)/python -m benchmarks.network.parity ../shared/sam6d/golden.npz
	@$(BIN)/python -m benchmarks.network $(ARGS)

bench-throughput: $(READY) $(PEERS)/.serving ## Poses a second beside the same engine behind other servers (about ten minutes)
	@$(BIN)/python -m benchmarks.service.throughput $(ARGS)

peers: $(PEERS)/.ready ## Prepare .venv-peers, where the accuracy benchmark's peers run

peers-serving: $(PEERS)/.serving ## The same with the throughput benchmark's: FastAPI, LitServe, BentoML

clean: ## Remove .venv, build outputs and caches; data/ stays
	rm -rf $(VENV) $(PEERS) build dist *.egg-info client/build client/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache
	rm -f pointnet2_ext/_kernels_*.so posekit/*/_kernels_*.so
	find $(PACKAGES) tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

system:
	@sh scripts/system_packages.sh runtime "$(PYTHON)"

SETUP := "$(PYTHON)" scripts/setup.py
INPUTS := constraints.txt pyproject.toml client/pyproject.toml setup.py scripts/setup.py $(KERNELS)

$(READY): $(INPUTS) | system
	@$(SETUP) $(VENV)
	@touch $@

$(DEV): $(INPUTS) | system
	@$(SETUP) $(VENV) --dev
	@touch $@ $(READY)

$(PEERS)/.ready: benchmarks/peers/requirements.txt constraints.txt | system
	@$(SETUP) $(PEERS) --requirement benchmarks/peers/requirements.txt
	@touch $@

$(PEERS)/.serving: benchmarks/peers/requirements-serving.txt $(PEERS)/.ready
	@$(SETUP) $(PEERS) --requirement benchmarks/peers/requirements-serving.txt
	@touch $@

$(VENV)/.test-programs: scripts/system_packages.sh $(DEV)
	@sh scripts/system_packages.sh test "$(PYTHON)"
	@touch $@
