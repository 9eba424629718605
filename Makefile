# Every target works alone on a fresh machine with Python >= 3.11 and make: the first one to run creates .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# PYTHONSAFEPATH: with the repository as working directory, a bare `import traces` must not find our folders.
export PYTHONSAFEPATH := 1
# Two test workers on two cores, each with two threads of BLAS that wait for one another, are ten times slower than one.
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: demo test lint bench fidelity site oracle lock clean

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kvtwin needs Python >= 3.11: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(READY)

demo: $(READY)   ## calibrate, simulate, validate and report on the bundled recordings
	$(BIN)/kvtwin demo

test: $(READY)   ## all tests (two workers)
	$(BIN)/pytest -n 2 --benchmark-skip -m "not fidelity"

lint: $(READY)   ## style, types, import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy -p kvtwin
	$(BIN)/mypy tests
	$(BIN)/lint-imports

bench: $(READY)   ## speed, as ratios against a reference in the same run
	$(BIN)/pytest tests/bench --benchmark-only

STUDIES := tests
fidelity: $(READY)   ## real hardware targets whose data lie in ../shared
	$(BIN)/pytest -m fidelity -s $(STUDIES)

SITE := site
site: $(READY)   ## check every hardware target at hand (bundled, and those whose data lie in ../shared) and draw the dashboards
	$(BIN)/kvtwin check traces/targets/* $(if $(wildcard ../shared/data),$(patsubst %/target.toml,%,$(wildcard tests/fidelity/*/target.toml))) -o $(SITE)/checks
	$(BIN)/kvtwin report $(SITE)/checks -o $(SITE)/pages

oracle: $(READY)   ## make oracle CASES=DIR: the simulator against logs of the real schedulers
	@$(BIN)/python tests/oracle/compare.py $(CASES)

lock: pyproject.toml   ## refresh requirements.lock (needs network)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --group dev pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .hypothesis .import_linter_cache
