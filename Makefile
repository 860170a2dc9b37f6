# make demo | make test are the two commands of the README; each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test slow deepspeed lint fix bench clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("mutoscope needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --group dev --editable ".[parquet,cuts,cogvideox,ray]"
	touch $@

demo: setup          ## train an autoencoder and a latent diffusion transformer on generated clips; minutes on 2 cores
	$(BIN)/mutoscope demo

test: setup          ## the fast suite
	$(BIN)/pytest -n 2 --dist loadfile

slow: setup          ## the tests that take minutes
	$(BIN)/pytest -m slow

deepspeed: setup     ## DeepSpeed's own tests; it lies beside .venv, since other libraries import it where they find it
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .deepspeed \
	    deepspeed einops hjson msgpack ninja py-cpuinfo
	PYTHONPATH=.deepspeed $(BIN)/pytest -m slow tests/distributed/test_deepspeed.py

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

fix: setup
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf .venv .deepspeed .mypy_cache .pytest_cache .ruff_cache
