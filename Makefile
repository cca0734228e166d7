# `make demo` and `make test` need python3.11, make and git, and set everything else up in .venv.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Distributions of their own, each with its tests: installed, tested and checked with the package.
# Not that of deepinv: it brings torchvision, whose binaries must be those of the installed torch, and which breaks other
# packages if they are not. `pip install deepinv -e plugins/deepinv` adds it, and its tests and page are run then.
PLUGINS := $(filter-out plugins/deepinv,$(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml)))
PLUGIN_TESTS := $(wildcard $(addsuffix /tests,$(PLUGINS)))

# Options for the installation of torch alone, for example
#   make test TORCH_FLAGS='--index-url https://download.pytorch.org/whl/cpu'
TORCH_FLAGS ?=

# What `make demo` compares: a module and a factory in it, e.g. DEMO=my_package.models:make. Empty: the built-in model.
DEMO ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test slow bench lint types docs figures ordinary certificate along clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# torch comes first and alone, pinned: left to the resolver, another build of it may be chosen, gigabytes larger.
$(STAMP): pyproject.toml constraints.txt $(addsuffix /pyproject.toml,$(PLUGINS))
	@echo "setting up $(VENV) (a few minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip --disable-pip-version-check install -qq $(TORCH_FLAGS) -c constraints.txt torch
	@$(BIN)/pip --disable-pip-version-check install -qq -c constraints.txt -e '.[dev]' $(addprefix -e ./,$(PLUGINS))
	@touch $@

install: $(STAMP) ## set up the environment and do nothing else

demo: $(STAMP) ## compare the backward passes on a small model: a plot, a table and the numbers in demo/
	@mkdir -p demo
	@$(BIN)/torchdeq-ep compare $(DEMO) --plot demo/compare.png --markdown demo/compare.md --json demo/compare.json
	@echo
	@echo "written: demo/compare.png  demo/compare.md  demo/compare.json"

test: $(STAMP) ## run the tests and the examples in docstrings and documentation, without the slow ones
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m "not slow" --doctest-modules tests torchdeq_ep $(PLUGINS)

# pytest exits with 5 if no test was collected.
slow: $(STAMP) ## run the slow tests
	@$(BIN)/python -m pytest -q -m slow tests $(PLUGIN_TESTS) || test $$? -eq 5

bench: $(STAMP) ## time the backward passes beside torchdeq: build/benchmark.json, and a page of it on the screen
	@mkdir -p build
	@$(BIN)/python -m pytest -q tests/benchmarks --benchmark-json=build/benchmark.json
	@$(BIN)/python docs/_benchmarks.py build/benchmark.json

lint: $(STAMP) types ## check style and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

# Each by itself: a plugin sees the package as its users do, installed and typed.
types: $(STAMP) ## check types
	@$(BIN)/mypy
	@for plugin in $(PLUGINS); do $(BIN)/mypy -p $$(basename $$plugin/torchdeq_ep_*) || exit 1; done

# Not --quiet, which keeps --strict from seeing the warnings.
docs: $(STAMP) ## build the documentation: site/index.html
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "written: site/index.html"

figures: $(STAMP) ## measure and draw the figures of the documentation again
	@$(BIN)/python docs/figures/alignment.py
	@$(BIN)/python docs/figures/estimators.py
	@$(BIN)/python docs/figures/benchmarks.py

# Two cores take an hour for the lot; runs that docs/results/ordinary.json has are not repeated.
ordinary: $(STAMP) ## train ordinary models in every mode, beside torchdeq's own: docs/ordinary.md
	@OMP_NUM_THREADS=1 $(BIN)/python docs/figures/ordinary.py

# Two cores take some hours for the lot; runs that docs/results/along.json has are not repeated.
along: $(STAMP) ## train with homeostasis of several weights: a figure and a table of docs/homeostasis.md
	@OMP_NUM_THREADS=1 $(BIN)/python docs/figures/along.py

certificate: $(STAMP) ## draw random maps: is a wrong gradient ever silent? docs/certificate.md
	@OMP_NUM_THREADS=1 $(BIN)/python docs/figures/certificate.py

clean: ## remove everything the other targets made, the environment included
	rm -rf $(VENV) demo build site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks runs sweeps
