# Every target sets up what it needs: a .venv with the exact versions of constraints.txt, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A process for each core, with one thread: sums, and so the notebooks' last digits, do not depend on the cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -n auto
EXECUTE := $(ONE_THREAD) $(BIN)/jupyter nbconvert --to notebook --execute --inplace \
  --ExecutePreprocessor.record_timing=False
BENCH_READY := $(VENV)/.bench-ready

.PHONY: help setup reproduce test quick check format lab notebooks notebook experiments mutants robust versions bench gpu data clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## install into .venv

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "minisign needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) --version); try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[notebooks,dev,hf]'
	@touch $@

$(BENCH_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

reproduce: $(READY) ## train all variants, print the table, leave pictures in runs/reproduce
	$(BIN)/minisign reproduce

test: $(READY) ## all tests and every notebook
	$(PYTEST) --nbval --nbval-current-env --nbval-cell-timeout 900 tests notebooks

quick: $(READY) ## the tests that are quick, for while you work
	$(PYTEST) -m "not slow" tests

check: $(READY) ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## let ruff rewrite the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lab: $(READY) ## JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

notebooks: $(READY) ## execute all notebooks and solutions and save their outputs
	$(EXECUTE) notebooks/*.ipynb notebooks/solutions/*.ipynb

notebook: $(READY) ## execute one and its solutions: make notebook N=04
	@ls notebooks/$(N)_*.ipynb >/dev/null 2>&1 \
	  || { echo "N=$(N) is no notebook: make notebook N=04 executes notebooks/04_*.ipynb" >&2; exit 1; }
	$(EXECUTE) $$(ls notebooks/$(N)_*.ipynb notebooks/solutions/$(N)_*.ipynb 2>/dev/null)

experiments: $(READY) ## make the runs that experiments/logs/ has not got (all of them: four hours)
	for script in experiments/*.py; do $(BIN)/python $$script || exit 1; done

mutants: $(READY) ## plant bugs, one at a time, and see a test turn red; writes docs/mutants.md
	$(BIN)/python tests/mutants.py

robust: $(READY) ## every claim under other rounding, and by how much it holds (hours; goes on where it was)
	$(BIN)/python tests/robust.py

versions: $(READY) ## tests under the oldest and newest torch, other Pythons; an hour, writes docs/versions.md
	$(BIN)/python tests/versions.py

bench: $(BENCH_READY) ## speed against other implementations, cost of the probes
	$(BIN)/python benchmarks/optimizer_step.py
	$(BIN)/python benchmarks/training_loop.py
	$(BIN)/python benchmarks/probes.py
	$(BIN)/python benchmarks/text.py

gpu: $(READY) ## on a machine with a CUDA card: all that only it can tell, in eight minutes
	$(BIN)/python -m benchmarks.gpu

data: $(READY) ## write data/ anew
	$(BIN)/python data/make.py

clean: ## remove .venv and what runs left
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
