PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test ui down clean lint lock

install: $(INSTALLED)  ## the virtual environment, from the lock

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: install  ## the whole pipeline on the built-in model, then one question with and without the adapter
	@$(BIN)/olivepress demo

test: install  ## everything
	$(BIN)/pytest

ui: install  ## start the Prefect server and say where its pages are
	@$(BIN)/olivepress ui

down:  ## stop what was started in the background
	@if [ -x $(BIN)/olivepress ]; then $(BIN)/olivepress down; fi

clean: down  ## remove what was made; the environment and DVC's cache stay
	rm -rf models metrics plots report data/prepared .prefect .pytest_cache .mypy_cache .ruff_cache build *.egg-info

lint: install  ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: install  ## write what is installed now into requirements.lock
	$(BIN)/pip freeze --all --exclude-editable | grep -v -E '^(pip|olivepress)==' | sed 's/+cpu$$//' > requirements.lock
