# One virtual environment serves every target; it is made on first use and renewed when its ingredients change.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.kvlock-installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet --progress-bar off
# A folder of real clips for the tests that want one: make test CLIPS=DIR
CLIPS  ?=
# How many tests run at once.
JOBS   ?= 2
# With "=": after a space pytest would take the folder for a place of tests, before it has read our options.
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --durations=20 --durations-min=1 $(if $(CLIPS),--clips="$(CLIPS)")

.PHONY: demo test test-all numeric matrix rooms options lint clean install
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(BIN)/kvlock-fast demo --output out/demo

test: $(STAMP)
	$(PYTEST)

test-all: $(STAMP)
	$(PYTEST) --all
	$(MAKE) numeric

# The tests marked numeric, by every instruction set that this processor has.
numeric: $(STAMP)
	$(BIN)/python -m tests.support.numeric

# The table of what works with which model, for the docs.
matrix: $(STAMP)
	$(PYTEST) tests/families/test_families.py -k "not test_the_page" --all --matrix=kvlock_fast/docs/families.md

# The picture of the rooms, for CONTRIBUTING.md.
rooms: $(STAMP)
	$(BIN)/python -m tests.project.rooms

# The page of every option, for the docs.
options: $(STAMP)
	$(BIN)/python -m tests.project.options

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/basedpyright

install: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch alone first: with everything at once the resolver may fetch several builds of it.
	$(PIP) -c constraints.txt torch==2.13.0
	$(PIP) -c constraints.txt -e ".[test]"
	@touch $@

clean:
	rm -rf build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis
