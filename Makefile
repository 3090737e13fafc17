# Commands of the repository. The first call makes the environment in .venv; later ones find it there.
#   make demo     forget a style of the bundled model, and measure what was forgotten and what was kept
#   make test     the tests            make check   lint, format, types, who imports whom, documentation
PYTHON ?= python3
VENV   ?= .venv
# Empty (`make test CONSTRAINTS=`) installs the newest versions instead of the tested ones.
CONSTRAINTS ?= constraints.txt
# Processes that run the tests, each with one thread: those of torch would be in one another's way. 0: none but pytest's own.
WORKERS ?= logical

BIN  := $(VENV)/bin
DOOR := $(BIN)/unlearn_diff
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: help install install-dev demo table test test-slow test-gpu gpu-check check format keys clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-12s %s\n", $$1, $$2 }'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "The tested versions (constraints.txt) need Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed          ## environment and package, at the tested versions
install-dev: $(VENV)/.installed-dev  ## the same, with what tests and checks need

demo: $(VENV)/.installed             ## mask, unlearn, sample and evaluate one style of the bundled model
	$(DOOR) mask --config_path emoji_canvas/mask_style.yaml
	$(DOOR) train --config_path emoji_canvas/train_style.yaml --validate_every_steps 20 --sample_every_steps 40
	$(DOOR) evaluate --config_path emoji_canvas/evaluate_style.yaml

table: $(VENV)/.installed            ## the results table of docs/results.md: every style and object; goes on where it stopped
	$(BIN)/python -m benchmarks.table --config_path benchmarks/emoji_canvas_table.yaml

test: $(VENV)/.installed-dev         ## the tests; ARGS="-k mask -x" is handed to pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(VENV)/.installed-dev    ## the tests that take long
	$(BIN)/python -m pytest -m 'slow and not gpu' $(ARGS)

test-gpu: $(VENV)/.installed-dev     ## the tests that need a CUDA device
	CUBLAS_WORKSPACE_CONFIG=:4096:8 $(BIN)/python -m pytest -m gpu $(ARGS)

gpu-check: $(VENV)/.installed-dev    ## all that only a GPU can answer; ARGS="--minutes 8" takes the first parts
	$(BIN)/python scripts/gpu_check.py $(ARGS)

check: $(VENV)/.installed-dev        ## lint, format, types, who imports whom, documentation (into site/)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # not --quiet, which hides warnings from --strict too

format: $(VENV)/.installed-dev       ## put the code into the house's form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

keys: $(VENV)/.installed             ## write docs/keys.md from the config classes
	$(BIN)/python scripts/keys_page.py

clean:                               ## remove builds and caches; data, models, outputs and .venv stay
	rm -rf build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find mu benchmarks tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
