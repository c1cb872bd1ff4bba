# Everything runs in a virtual environment of its own, with the versions in constraints.txt.
#   make quickstart   photographs -> teacher -> family of students -> scores and a picture
#   make test         format, lint, types, tests; the commit that passed is in .test-passed
#   make test-slow    the tests marked slow: whole jobs, large counts, the pretended GPU
#   make docs         the site of docs/, in docs/_build; a warning is an error
#   make gpu          what one GPU shows in ten minutes, in gpu.json; GPU_PYTHON=python3 takes an interpreter as it is
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
COMMIT := $(shell git rev-parse --verify HEAD 2>/dev/null)
# Two workers; the tests of a file stay together, since they share what its fixtures trained.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup quickstart quickstart-short test test-slow docs gpu format lint types unit clean

setup: $(READY)

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

quickstart: setup
	$(BIN)/distill train recipes/quickstart.yaml $(ARGS)

# The same job with a tenth of the steps: does everything run, not how good it gets.
quickstart-short: setup
	$(BIN)/distill train recipes/quickstart.yaml --fresh --plain --name quickstart-short $(ARGS) \
		schedule.steps=20 teacher:stages.0.steps=20 teacher:stages.1.steps=10 teacher:stages.1.gram.teacher=base@10 teacher:stages.1.gram.refresh=5

test: format lint types unit
	@if [ -n "$(COMMIT)" ] && [ "$$(git rev-parse HEAD)" = "$(COMMIT)" ] && [ -z "$$(git status --porcelain)" ]; \
	then echo $(COMMIT) > .test-passed; fi

test-slow: setup
	$(PYTEST) -m slow -rs

docs: setup
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . docs/_build
	@echo docs/_build/index.html

# With GPU_PYTHON nothing is installed: packages may be missing, and each that is costs the checks that import it.
ifdef GPU_PYTHON
gpu:
	$(GPU_PYTHON) -m tests.gpu $(ARGS)
else
gpu: setup
	$(BIN)/python -m tests.gpu $(ARGS)
endif

format: setup
	$(BIN)/ruff format --check .

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

unit: setup
	$(PYTEST) -m "not slow"

clean:
	rm -rf $(VENV) runs docs/_build .test-passed .pytest_cache .mypy_cache .ruff_cache
