# `make demo`, `make test` and `make docs` on a fresh machine; each can be the first one run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --progress-bar on
OLD := Python 3.11 or newer is needed, and $(PYTHON) is not one; give it as: make $(MAKECMDGOALS) PYTHON=python3.12
BARE := $(PYTHON) comes without venv; on Debian and Ubuntu: apt install python3-venv

.PHONY: demo test lint docs clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "error: $(OLD)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(BARE)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --constraint constraints.txt --editable .
	touch $@

$(VENV)/.ready: $(VENV)/.installed
	$(PIP) --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m qwen_lit.demo

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

lint: $(VENV)/.ready
	$(BIN)/ruff check qwen_lit tests benchmarks docs examples
	$(BIN)/ruff format --check qwen_lit tests benchmarks docs examples
	$(BIN)/mypy

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) output site
