# Everything that a newcomer needs: `make demo` and `make test` set themselves up.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test coverage lint format bench docs wheel clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.12 chooses the interpreter of a new $(VENV)"

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "adq-train needs Python 3.10 or newer; choose one with PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing PyTorch and the tools into $(VENV): some 6 GB, some minutes'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

setup: $(STAMP)  ## Make .venv and install the package with its tools

demo: $(STAMP)  ## Run the main job: a small ResNet on digits, through all stages
	$(BIN)/adq-train experiment=quickstart

TESTS := $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal

test: $(STAMP)  ## Run the tests
	$(TESTS)

coverage: $(STAMP)  ## Run the tests and list the lines that none reaches; takes longer
	$(TESTS) --cov --cov-report=term-missing:skip-covered

lint: $(STAMP)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## Measure the training step and each quantizer, for docs/performance.md
	$(BIN)/python scripts/bench_step.py --memory --methods adq adq_plain lsq brevitas --bits 2 3 4 8
	$(BIN)/python scripts/bench_quantizers.py

docs: $(STAMP)  ## Build the documentation as a site in outputs/site, every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(STAMP)  ## Build dist/*.whl
	$(BIN)/python -m build --wheel --no-isolation

clean:  ## Remove .venv, caches and builds; outputs/ stays
	rm -rf $(VENV) build dist *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
