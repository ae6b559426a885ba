# Every target makes .venv from pyproject.toml when it is not there. Without make, see "Two commands" in README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-slow test-numerics bench lint clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[demo,dev]'
	touch $@

demo: setup
	$(BIN)/python -m adamerge.testbed.demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile

test-numerics: setup
	$(BIN)/python tests/processors.py

bench: setup
	$(BIN)/python tests/benchmarks/step.py
	$(BIN)/python tests/benchmarks/parametrizations.py
	$(BIN)/python tests/benchmarks/language_model.py --compare
	$(BIN)/python tests/benchmarks/startup.py
	$(BIN)/python tests/benchmarks/export.py
	$(BIN)/python tests/benchmarks/peers.py
	$(BIN)/python tests/benchmarks/sharded.py
	$(BIN)/python tests/benchmarks/growth.py
	$(BIN)/python tests/benchmarks/solvers.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build *.egg-info
