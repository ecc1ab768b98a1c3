PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test test-long fuzz audit ui down clean lint lock upgrade azure-up azure-down

install: $(INSTALLED)  ## the virtual environment, from the lock

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: install  ## the whole pipeline on the built-in model, then one question with and without the adapter
	@$(BIN)/olivepress demo

test: install  ## everything but what takes minutes
	$(BIN)/pytest

test-long: install  ## what takes minutes: sweeps in bad weather, real runs, kills, full disks
	$(BIN)/pytest -m long

fuzz: install  ## 100,000 cases for the readers of what others wrote, some minutes
	$(BIN)/python -m tests.fuzz --cases 100000

# Without --disable-pip it would resolve the lock anew, in an environment of its own.
audit: .audit  ## known weaknesses in what the lock installs; asks the package index
	.audit/bin/pip-audit --strict --disable-pip --no-deps -r requirements.lock

.audit:  ## pip-audit, in an environment of its own
	$(PYTHON) -m venv .audit
	.audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1 || \
	    { rm -rf .audit; exit 1; }

ui: install  ## start the Prefect server and say where its pages are
	@$(BIN)/olivepress ui

down:  ## stop what was started in the background
	@if [ -x $(BIN)/olivepress ]; then $(BIN)/olivepress down; fi

clean: down  ## remove what was made; the environment and DVC's cache stay
	rm -rf models metrics plots report sweeps exports data/prepared .prefect .pytest_cache .mypy_cache .ruff_cache build *.egg-info

lint: install  ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.azurite:  ## the emulator of Azure's blob storage, from npm
	npm install --silent --no-fund --no-audit --prefix .azurite azurite@3.35.0 || \
	    { rm -rf .azurite; exit 1; }

azure-up: install .azurite  ## an Azure on this machine to try publish and jobs on, without an account
	@if [ -e .azure/pid ] && kill -0 $$(cat .azure/pid) 2>/dev/null; then \
	    echo "It is up already; type: . .azure/env.sh"; exit 0; fi; \
	mkdir -p .azure && echo '*' > .azure/.gitignore && rm -f .azure/env.sh; \
	nohup $(BIN)/python -m tests.emulator --home .azure > .azure/emulator.log 2>&1 & started=$$!; \
	until [ -e .azure/env.sh ]; do \
	    kill -0 $$started 2>/dev/null || { cat .azure/emulator.log; exit 1; }; sleep 0.2; done; \
	echo "Up. In each shell that is to use it, type: . .azure/env.sh"; \
	echo "Workspace press-workspace, registry press-registry, cluster gpu-cluster."; \
	echo "Calls are in .azure/calls.jsonl; make azure-down ends it."

azure-down:  ## end it, with all that it stored
	@if kill $$(cat .azure/pid 2>/dev/null) 2>/dev/null; then \
	    timeout 20 sh -c 'while [ -e .azure/pid ]; do sleep 0.2; done'; fi; rm -rf .azure

.mlflow:  ## an MLflow server, in an environment of its own as it does not go with the lock
	$(PYTHON) -m venv .mlflow
	.mlflow/bin/pip install --quiet --disable-pip-version-check mlflow==3.17.2 || \
	    { rm -rf .mlflow; exit 1; }

lock: install  ## write what is installed now into requirements.lock
	$(BIN)/pip freeze --all --exclude-editable | grep -v -E '^(pip|olivepress)==' | sed 's/+cpu$$//' > requirements.lock

upgrade: install  ## the newest of everything within pyproject.toml's ranges, into the lock if all passes
	$(BIN)/python -m tests.versions --latest
