# Everything a first user needs. 'make' alone lists the targets.
#
#   STACK   onedl (default) or openmmlab: which set of packages
#   ENV     folder of the environment, .venv or .venv-openmmlab
#   PYTHON  interpreter to create it with; else python3.11, python3.12, python3
#   ARGS    passed on to pytest or to the demo, as in make test ARGS='-k solver'

SHELL := bash
STACK ?= onedl
ENV ?= $(if $(filter openmmlab,$(STACK)),.venv-openmmlab,.venv)
PYTHON ?=
ARGS ?=

RUN := $(ENV)/bin/python
# The tests of a file stay together, because they share what is slow to make. A
# process takes a core and about 2 GB.
TESTS := $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile \
    --no-loadscope-reorder
STAMP := $(ENV)/.setup-done
OPTIONS := $(if $(filter openmmlab,$(STACK)), STACK=openmmlab)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format docs linkcheck clean clean-env FORCE

help: ## List the targets
	@echo 'Usage: make TARGET [STACK=onedl|openmmlab] [PYTHON=python3.11] [ARGS=...]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s  %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## Set up the environment (.venv, or .venv-openmmlab)
	@echo 'Ready: $(ENV) (stack $(STACK), $(shell $(RUN) --version 2>&1)).'
	@echo 'Next: make demo$(OPTIONS), make test$(OPTIONS), or source $(ENV)/bin/activate,' \
	    'which makes its python yours.'

demo: $(STAMP) ## Train MDEQs and their peers on handwritten digits, and compare
	@$(RUN) tools/demo/digits_demo.py $(ARGS)

test: $(STAMP) ## Run the tests, but for the slow ones
	@OMP_NUM_THREADS=1 $(TESTS) -m 'not slow' $(ARGS)

test-slow: $(STAMP) ## Run the slow tests
	@OMP_NUM_THREADS=1 $(TESTS) -m slow $(ARGS)

lint: $(STAMP) ## Check style and format
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

format: $(STAMP) ## Correct style and format
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

docs: $(STAMP) ## Build the documentation as a static site in site/
	@$(RUN) -m sphinx -W --keep-going -q -c docs -d build/doctrees . site
	@echo 'Open site/index.html.'

linkcheck: $(STAMP) ## Check the external links of the documentation
	@$(RUN) -m sphinx -W --keep-going -q -b linkcheck -c docs -d build/doctrees . build/links

clean: ## Remove caches and build products; results and environments stay
	@rm -rf build dist site *.egg-info .pytest_cache .hypothesis
	@find . -path './.venv*' -prune -o -path ./work_dirs -prune -o \
	    \( -name __pycache__ -o -name .ruff_cache \) -type d -exec rm -rf {} +

clean-env: ## Remove the environment of STACK
	rm -rf '$(ENV)'

# Set up again when a requirement changes, or when the folder was moved, for the
# environment holds the path of this one.
ifneq ($(shell cat '$(STAMP)' 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif

$(STAMP): $(wildcard requirements/*) setup.py
	@bash requirements/install.sh '$(STACK)' '$(ENV)' '$(PYTHON)'

FORCE:
