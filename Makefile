SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
PEERS := $(basename $(notdir $(wildcard peers/*.lock)))
hash = $(shell cksum < $(1) | cut -d' ' -f1)
# A stamp bears the hash of its lock and is written last: what is installed is done again only when the lock changes.
STAMP := $(VENV)/.installed-$(call hash,requirements.lock)
STRIP := $(BIN)/nbstripout --keep-id --extra-keys "metadata.papermill cell.metadata.papermill metadata.widgets"
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
export PYTHON

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 14

$(STAMP):
	@.ci/install $(VENV) requirements.lock --project
	@rm -f $(VENV)/.installed-*
	@touch $@

.PHONY: install
install: $(STAMP) ## Create .venv with the pinned packages and labkit

.PHONY: lab
lab: $(STAMP) ## Install, run the notebooks of profile quick, build the HTML report
	@status=0; $(BIN)/labkit run --profile quick || status=$$?; $(BIN)/labkit report; exit $$status

# What only computes runs on all cores; what measures time, or has several processes itself, has the machine for itself.
COMPUTE := $(addprefix tests/,batcher bench kernels models training test_core.py test_soak.py)
QUICK := not slow and not peers and not gpu

.PHONY: test
test: $(STAMP) ## Run the tests, notebooks of profile quick included
	@$(BIN)/python -m pytest -q -n auto --dist loadfile -m "$(QUICK)" --durations=8 $(COMPUTE)
	@$(BIN)/python -m pytest -q -m "$(QUICK)" --durations=15 $(addprefix --ignore=,$(COMPUTE)) tests

.PHONY: test-all
test-all: $(STAMP) ## Run the slow tests and those for a GPU too
	@$(BIN)/python -m pytest -q -m "not peers" --durations=15

.PHONY: test-peers
test-peers: $(STAMP) $(addprefix peer-,$(PEERS)) ## Check labkit against programs that others wrote
	@$(BIN)/python -m pytest -q -m peers tests/peers

peer-%: peers/%.lock
	@stamp=.venv-peers/$*/.installed-$$(cksum < $< | cut -d' ' -f1); \
	if [ ! -e $$stamp ]; then .ci/install .venv-peers/$* $<; rm -f .venv-peers/$*/.installed-*; touch $$stamp; fi

.PHONY: lint
lint: $(STAMP) ## Check style, types and that notebooks carry no outputs
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(if $(NOTEBOOKS),$(STRIP) --verify $(NOTEBOOKS))

.PHONY: format
format: $(STAMP) ## Format code and notebooks, remove outputs from notebooks
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .
	@$(if $(NOTEBOOKS),$(STRIP) $(NOTEBOOKS))

.PHONY: jupyter
jupyter: $(STAMP) ## Open JupyterLab on notebooks/
	@cd notebooks && ../$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: lock
lock: ## Write the lock files anew, keeping pins that still fit (UPGRADE=--upgrade takes the newest)
	@.ci/install .venv-lock .ci/lock.txt
	@.venv-lock/bin/python -m pip install -q --upgrade pip
	@.venv-lock/bin/python .ci/lock.py $(UPGRADE) requirements.lock "$$(grep -E '^torch==' requirements.lock)" -e '.[dev]'
	@.venv-lock/bin/python .ci/lock.py $(UPGRADE) peers/openai.lock openai
	@.venv-lock/bin/python .ci/lock.py $(UPGRADE) peers/guidellm.lock guidellm==0.8.1 "$$(grep -E '^torch==' requirements.lock)"

.PHONY: clean
clean: ## Remove environments, caches, runs and the report
	@rm -rf $(VENV) .venv-peers .venv-lock runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
