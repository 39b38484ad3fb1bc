# Each target starts from a bare machine with Python: the virtual environment is made on the way.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all check clean

demo: .venv/run
	HF_HUB_OFFLINE=1 $(BIN)/redflag demo

test: .venv/dev
	scripts/test -m "not slow"

test-all: .venv/dev
	scripts/test

check: .venv/dev
	scripts/check

.venv/run: pyproject.toml constraints.txt
	PYTHON=$(PYTHON) scripts/install
	@touch $@

.venv/dev: pyproject.toml constraints.txt
	PYTHON=$(PYTHON) scripts/install dev
	@touch $@

clean:
	rm -rf .venv runs build dist *.egg-info
