# Every target sets up what it needs: a .venv with the exact versions of constraints.txt, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.bench-ready

.PHONY: help setup reproduce test check format lab notebooks bench data clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## install into .venv

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "minisign needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) --version); try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[notebooks,dev]'
	@touch $@

$(BENCH_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

reproduce: $(READY) ## train all variants, print the table, leave pictures in runs/reproduce
	$(BIN)/minisign reproduce

test: $(READY) ## all tests, then every notebook
	$(BIN)/python -m pytest tests
	$(BIN)/python -m pytest --nbval --nbval-current-env --nbval-cell-timeout 300 notebooks

check: $(READY) ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## let ruff rewrite the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lab: $(READY) ## JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

notebooks: $(READY) ## execute the notebooks and save their outputs
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb

bench: $(BENCH_READY) ## speed against other implementations
	$(BIN)/python benchmarks/optimizer_step.py
	$(BIN)/python benchmarks/training_loop.py

data: $(READY) ## write data/ anew
	$(BIN)/python data/make.py

clean: ## remove .venv and what runs left
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
