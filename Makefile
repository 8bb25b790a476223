# Two commands on a fresh machine: `make demo` and `make test`. Each can be the first one run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,zstd]'
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python -m qwen_lit.demo

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

lint: $(VENV)/.ready
	$(BIN)/ruff check qwen_lit tests benchmarks
	$(BIN)/mypy

clean:
	rm -rf $(VENV) output
