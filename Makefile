# `make demo` and `make test` need a Python of at least 3.11, make and git, and set everything else up in .venv.

# The Python that .venv is made with: the first of these that runs and is new enough, or the one that is named, as in
#   make install PYTHON=python3.13
PYTHON ?=
PYTHONS := python3.11 python3.12 python3.13 python3.14 python3 python
# Installs in a fraction of pip's time, where it is there; `make UV=` does without.
UV ?= $(shell command -v uv)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL = $(if $(UV),$(UV) pip install --quiet --python $(BIN)/python,$(BIN)/pip --disable-pip-version-check install -qq)

# Distributions of their own, each with its tests: installed, tested and checked with the package.
# Not that of deepinv: it brings torchvision, whose binaries must be those of the installed torch, and which breaks other
# packages if they are not. `pip install deepinv -e plugins/deepinv` adds it, and its tests and page are run then.
PLUGINS := $(filter-out plugins/deepinv,$(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml)))
PLUGIN_TESTS := $(wildcard $(addsuffix /tests,$(PLUGINS)))

# Options for the installation of torch alone, for example
#   make test TORCH_FLAGS='--index-url https://download.pytorch.org/whl/cpu'
TORCH_FLAGS ?=

# A model of your own for `make demo` to compare: a module and a factory in it, e.g. DEMO=my_package.models:make.
DEMO ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test matrix slow bench lint types docs wheels owner figures ordinary certificate along zoo clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# torch comes first and alone, pinned: left to the resolver, another build of it may be chosen, gigabytes larger.
$(STAMP): pyproject.toml constraints.txt $(addsuffix /pyproject.toml,$(PLUGINS))
	@found=; for python in $(or $(PYTHON),$(PYTHONS)); do \
	    $$python -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && found=$$python && break; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "no Python of at least 3.11 among: $(or $(PYTHON),$(PYTHONS))"; \
	    echo "Install one, or name it: make $(or $(MAKECMDGOALS),install) PYTHON=/path/to/python3"; exit 1; \
	fi; \
	echo "setting up $(VENV) with $$found (a few minutes, once)"; \
	if [ -n "$(UV)" ]; then $(UV) venv --quiet $(if $(PYTHON),--clear,--allow-existing) --python "$$(command -v $$found)" $(VENV); \
	else $$found -m venv $(if $(PYTHON),--clear) $(VENV) \
	    || { echo "Debian and Ubuntu have the module in a package of its own: apt install python3-venv"; exit 1; }; fi
	@$(INSTALL) $(TORCH_FLAGS) -c constraints.txt torch
	@$(INSTALL) -c constraints.txt -e '.[dev]' $(addprefix -e ./,$(PLUGINS))
	@touch $@

install: $(STAMP) ## set up the environment and do nothing else

demo: $(STAMP) ## train an ordinary model by four gradients and compare them: a figure, a table and the numbers in demo/
	@mkdir -p demo
	@OMP_NUM_THREADS=1 $(BIN)/torchdeq-ep $(if $(DEMO),compare $(DEMO),demo) --plot demo/demo.png --markdown demo/demo.md --json demo/demo.json
	@echo
	@echo "written: demo/demo.png  demo/demo.md  demo/demo.json"

test: $(STAMP) ## run the tests and the examples in docstrings and documentation, without the slow ones
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow" --doctest-modules tests torchdeq_ep $(PLUGINS)

# What to test, and how: MATRIX='--python 3.12 --versions newest', for example; python tests/matrix.py --help.
MATRIX ?= --record

matrix: $(STAMP) ## run the tests on the oldest and newest versions that are supported, on every Python found
	@$(BIN)/python tests/matrix.py --torch-flags='$(TORCH_FLAGS)' $(MATRIX)

# pytest exits with 5 if no test was collected.
slow: $(STAMP) ## run the slow tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m slow tests $(PLUGIN_TESTS) || test $$? -eq 5

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

wheels: $(STAMP) ## build the distributions, check them, and use them in an environment without the checkout
	@rm -rf dist && mkdir -p build
	@for part in . $(PLUGINS); do $(BIN)/python -m build --no-isolation --outdir dist $$part >build/build.log 2>&1 \
	    || { cat build/build.log; exit 1; }; done
	@$(BIN)/python -m twine check --strict dist/*
	@$(BIN)/python tests/wheels.py dist --torch-flags='$(TORCH_FLAGS)'

owner: ## write NAME where OWNER stands for the account on the host, and CITATION.cff with it
	@test -n "$(NAME)" || { echo "who? make owner NAME=account"; exit 1; }
	@git grep -lE '(github.com|githubusercontent.com)/OWNER/|//OWNER\.github\.io' -- . ':!Makefile' | xargs sed -i \
	    -e 's#\(github.com\|githubusercontent.com\)/OWNER/#\1/$(NAME)/#g' -e 's#//OWNER\.github\.io#//$(NAME).github.io#g'

figures: $(STAMP) ## measure and draw the figures of the documentation again
	@$(BIN)/python docs/figures/nudge.py
	@$(BIN)/python docs/figures/alignment.py
	@$(BIN)/python docs/figures/estimators.py
	@$(BIN)/python docs/figures/benchmarks.py
	@$(BIN)/python docs/figures/reproduction.py
	@$(BIN)/python docs/figures/angles.py

# Two cores take an hour for the lot; runs that docs/results/ordinary.json has are not repeated.
ordinary: $(STAMP) ## train ordinary models in every mode, beside torchdeq's own: docs/ordinary.md
	@OMP_NUM_THREADS=1 $(BIN)/python docs/figures/ordinary.py

# Two cores take some hours for the lot; runs that docs/results/along.json has are not repeated.
along: $(STAMP) ## train with homeostasis of several weights: a figure and a table of docs/homeostasis.md
	@OMP_NUM_THREADS=1 $(BIN)/python docs/figures/along.py

certificate: $(STAMP) ## draw random maps: is a wrong gradient ever silent? docs/certificate.md
	@OMP_NUM_THREADS=1 $(BIN)/python docs/figures/certificate.py

# A checkout of https://github.com/locuslab/torchdeq, outside this one: make zoo ZOO=../torchdeq. Two cores take half an hour.
zoo: $(STAMP) ## switch the models of torchdeq's own zoo, from the checkout that ZOO names: docs/zoo.md
	@test -n "$(ZOO)" || { echo "where is a checkout of https://github.com/locuslab/torchdeq? make zoo ZOO=path"; exit 1; }
	@OMP_NUM_THREADS=1 $(BIN)/python docs/figures/zoo.py '$(ZOO)'

clean: ## remove everything the other targets made, the environment included
	rm -rf $(VENV) demo build site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks runs sweeps
