# Each target sets up what it needs by itself: the system libraries, `.venv` with everything pinned, and the compiled
# kernels. The first run downloads for some minutes; later ones start at once.
#   make PYTHON=python3.12 test     another interpreter (3.11 or newer)
#   make serve ARGS="--port 9000"   options for the command

PYTHON ?= python3.11
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
KERNELS := $(wildcard pointnet2_ext/csrc/* posekit/*/csrc/*)
PEERS := .venv-peers
BENCHMARKS := accuracy kernels.points kernels.geometric service.gateway_overhead service.fairness service.overload
PACKAGES := client serve workers posekit pointnet2_ext

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup system demo serve test lint check bench bench-accuracy bench-network bench-throughput peers peers-serving clean

help: ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS='	' read -r name text; do printf '  make %-14s %s\n' "$$name" "$$text"; done

setup: $(READY) ## Prepare .venv and the system libraries, nothing else

demo: $(READY) ## Start a server, estimate a pose in a synthetic scene, compare it with the truth
	@$(BIN)/pem demo $(ARGS)

serve: $(READY) ## Run the server on http://127.0.0.1:8003 (Ctrl-C drains and stops it)
	@$(BIN)/pem serve $(ARGS)

test: $(READY) $(VENV)/.test-programs $(PEERS)/.ready ## Run the tests
	@$(BIN)/python -m pytest $(ARGS)

lint: $(READY) ## Check formatting, style and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/mypy --python-version 3.10 --package pem

check: lint test ## Everything CI runs: lint, then test

bench: $(READY) ## Run the main benchmarks (minutes)
	@set -e; for name in $(BENCHMARKS); do echo "== python -m benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name $(ARGS); done

bench-accuracy: $(READY) $(PEERS)/.ready ## Measure the engine beside its peers: accuracy, confidence, seconds (about six minutes)
	@$(BIN)/python -m benchmarks.accuracy --http --wrong-objects --tracking --real --peers open3d,opencv \
		--page build/accuracy --json build/accuracy.json $(ARGS)

bench-network: $(READY) ## Compare the network with the original's numbers, then time it beside a plain one (three minutes)
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

$(READY): constraints.txt pyproject.toml client/pyproject.toml setup.py scripts/setup.sh $(KERNELS) | system
	@sh scripts/setup.sh "$(PYTHON)" "$(VENV)"
	@touch $@

$(PEERS)/.ready: benchmarks/peers/requirements.txt constraints.txt | system
	@echo "setup: making $(PEERS) for the peers of the accuracy benchmark"
	@"$(PYTHON)" -m venv --clear $(PEERS)
	@$(PEERS)/bin/python -m pip --disable-pip-version-check install --constraint constraints.txt \
		--requirement benchmarks/peers/requirements.txt >$(PEERS)/setup.log 2>&1 || { tail -n 40 $(PEERS)/setup.log >&2; exit 1; }
	@touch $@

$(PEERS)/.serving: benchmarks/peers/requirements-serving.txt $(PEERS)/.ready
	@echo "setup: adding to $(PEERS) the peers of the throughput benchmark"
	@$(PEERS)/bin/python -m pip --disable-pip-version-check install --constraint constraints.txt \
		--requirement benchmarks/peers/requirements-serving.txt >$(PEERS)/setup.log 2>&1 || { tail -n 40 $(PEERS)/setup.log >&2; exit 1; }
	@touch $@

$(VENV)/.test-programs: scripts/system_packages.sh $(READY)
	@sh scripts/system_packages.sh test "$(PYTHON)"
	@touch $@
