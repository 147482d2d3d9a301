# For people and CI alike. Every target works on a clean checkout: what it needs is installed into .venv first.
PYTHON ?= python3
DOCKER ?= docker
ARGS   ?=
VENV   := .venv

BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --quiet --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: help install serve test test-browser test-deploy chaos soak audit lint bench-engine bench-agreement bench-peers \
  bench-adaptive bench-capacity bench-cold-start simulate simulate-full simulate-scaling format lock lock-image image \
  image-cuda clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.dev ## Install everything for development into .venv

serve: $(VENV)/.serve ## Run the server in the foreground; ARGS="--port 9000" adds flags
	@exec $(BIN)/scala-serve serve $(ARGS)

test: lint ## Run the linters, then the tests that need nothing else; ARGS="-k name" adds flags
	$(BIN)/python -m pytest -q --ignore=tests/browser --ignore=tests/deploy --ignore=tests/chaos $(ARGS)

test-browser: $(VENV)/.dev ## Try the playground in a real browser: needs chromium (apt-get install chromium)
	$(BIN)/python -m pytest -q tests/browser $(ARGS)

test-deploy: $(VENV)/.dev ## Check what deploy/ holds: needs kubectl, and takes promtool and checkov where they are
	$(BIN)/python -m pytest -q tests/deploy $(ARGS)

bench-engine: $(VENV)/.dev ## Measure the engine against its rivals: 7 minutes on an idle machine
	$(BIN)/python -m benchmarks.engine $(ARGS)

bench-agreement: $(VENV)/.dev ## Compare every engine with the specification on Tiny ImageNet (SCALA_DATA_DIR)
	$(BIN)/python -m benchmarks.agreement $(ARGS)

bench-peers: $(VENV)/.dev ## Measure the server beside others with the same engine: 6 minutes, idle machine, needs wrk
	$(BIN)/python -m benchmarks.peers $(ARGS)

bench-adaptive: $(VENV)/.dev ## Compare policies live, on labelled images (SCALA_DATA_DIR): 14 minutes on an idle machine
	$(BIN)/python -m benchmarks.adaptive $(ARGS)

bench-capacity: $(VENV)/.dev ## Measure what one replica serves, by cores and width: 3 minutes, idle machine, needs wrk
	$(BIN)/python -m benchmarks.capacity $(ARGS)

bench-cold-start: $(VENV)/.dev ## Time a new replica's first answer, alone and beside a busy one: 1 minute, idle machine
	$(BIN)/python -m benchmarks.cold_start $(ARGS)

simulate: $(VENV)/.dev ## Compare policies in simulated time, on two profiles: 10 minutes
	$(BIN)/scala-serve simulate $(ARGS)

simulate-full: $(VENV)/.dev ## The same with all policies and workloads: hours, and goes on where it was stopped
	$(BIN)/scala-serve simulate --full $(ARGS)

simulate-scaling: $(VENV)/.dev ## Simulate replicas and their autoscaler by several signals: goes on where it was stopped
	$(BIN)/python -m benchmarks.scaling $(ARGS)

# Interrupted after 14:50, it still ends with its line of JSON, which says then that it is not finished.
chaos: $(VENV)/.dev ## Attack a real server: 11 to 15 minutes, JSON last line; CHAOS_SEED=random tries other bytes
	timeout --signal=INT --kill-after=10 890 $(BIN)/python -m pytest -q tests/chaos $(ARGS)

soak: $(VENV)/.dev ## The soak of chaos for 30 minutes and its overload for one, samples as they come
	SOAK_MINUTES=30 OVERLOAD_SECONDS=60 $(BIN)/python -m pytest -q -s tests/chaos/test_soak.py tests/chaos/test_overload.py $(ARGS)

# In an environment of its own: what it needs is no dependency of ours. Without a network it fails and says so.
audit: ## Look up known vulnerabilities of all locked packages: needs the network
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip --quiet --disable-pip-version-check install pip-audit
	.venv-audit/bin/pip-audit --strict --disable-pip --require-hashes --requirement deploy/image/cpu.txt
	.venv-audit/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

lint: $(VENV)/.dev ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev ## Format the code and fix what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Lock with the oldest Python we support, so that every newer one can install the same versions.
lock: ## Write the newest versions that fit into constraints.txt (torch stays: edit its line by hand)
	rm -rf .venv-lock
	$(MAKE) VENV=.venv-lock .venv-lock/.torch
	.venv-lock/bin/python -m pip --quiet install "$(TORCH)" -e ".[bench,dev]"
	@{ echo "# What the project is tested with: core and all extras, resolved on the oldest Python. Regenerate: make lock"; \
	   .venv-lock/bin/python -m pip freeze --all --exclude pip --exclude-editable | sed 's/+cpu$$//'; } > .venv-lock/new
	mv .venv-lock/new constraints.txt
	rm -rf .venv-lock

# `--universal`: one file for x86-64 and Arm. Versions are those of constraints.txt; what is not in there, CUDA for one,
# stays as it is locked, until its line is deleted or ARGS="--upgrade" asks for the newest.
LOCK_IMAGE := .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.12 --generate-hashes --no-annotate \
  --custom-compile-command "make lock-image" --constraints constraints.txt

lock-image: ## Write what the container images install, with hashes, into deploy/image
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip --quiet install uv
	echo 'hatchling' | $(LOCK_IMAGE) $(ARGS) --output-file deploy/image/build.txt -
	$(LOCK_IMAGE) $(ARGS) --extra cpu --extra rate-limit --extra tracing --output-file deploy/image/cpu.txt pyproject.toml
	$(LOCK_IMAGE) $(ARGS) --extra torch --extra rate-limit --extra tracing --output-file deploy/image/cuda.txt pyproject.toml
	rm -rf .venv-lock

VERSION   := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
IMAGE_ARGS = --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD)

image: ## Build the CPU container image; DOCKER=podman builds with another, ARGS="--push" adds flags
	$(DOCKER) build --target cpu --tag scala-serve:$(VERSION) $(IMAGE_ARGS) $(ARGS) .

image-cuda: ## Build the image for NVIDIA GPUs
	$(DOCKER) build --target cuda --tag scala-serve:$(VERSION)-cuda $(IMAGE_ARGS) $(ARGS) .

clean: ## Remove .venv, caches and builds
	rm -rf $(VENV) .venv-audit .venv-lock dist build .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# ---- the environment: one .venv, and a stamp for each thing that was installed into it ----

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(v < (3, 11) and "$(PYTHON) is Python %d.%d; 3.11 or newer is needed: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# On Linux PyPI's torch brings gigabytes of CUDA, so without an NVIDIA GPU it comes from PyTorch's CPU index.
$(VENV)/.torch: $(VENV)/.created constraints.txt
	@if [ "$$(uname)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then \
	  echo "Installing $(TORCH) for the CPU"; \
	  $(PIP) install --no-deps --retries 1 --timeout 30 \
	    --index-url https://download.pytorch.org/whl/cpu "$(TORCH)"; \
	fi
	@touch $@

# A CPU is served by OpenVINO, without torch; a GPU by torch.
$(VENV)/.serve: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing what serving needs"
	@if nvidia-smi -L >/dev/null 2>&1; then extra=torch; else extra=cpu; fi; \
	  $(PIP) install -c constraints.txt -e ".[$$extra]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "Installing what development needs"
	@$(PIP) install -c constraints.txt -e ".[bench,dev]"
	@touch $(VENV)/.serve $@
