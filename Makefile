# Two commands: `make demo` and `make test`. The others are parts of them.
# `make test PYTHON=python3.13 VENV=.venv-3.13` takes another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS := cpu

# Of `quick` and `oldest`: an eighth of the tests, some of every file, takes a few
# minutes. PART=2/8 is the next one, PART=1/1 has them all.
PART ?= 1/8

.PHONY: demo test quick clients lint doctest oldest bench readme clean

demo: $(VENV)/examples
	$(BIN)/python examples/demo.py

# With the examples of the docstrings, which `make doctest` runs alone.
test: $(VENV)/test lint
	$(BIN)/pytest -n 2 --dist worksteal -q --doctest-modules optax_mp tests

quick: $(VENV)/test
	$(BIN)/pytest -n 2 --dist worksteal -q --part $(PART)

# Other people's libraries, with a trainer that brings some sixty packages.
clients: $(VENV)/clients
	$(BIN)/pytest -n 2 --dist worksteal -q tests/clients

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

doctest: $(VENV)/test
	$(BIN)/pytest -q --doctest-modules optax_mp

# With the oldest versions that pyproject.toml allows.
oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q -e '.[test]' -c .ci/oldest.txt
	.venv-oldest/bin/pytest -n 2 --dist worksteal -q \
	  -W ignore::DeprecationWarning --part $(PART)

# Everything that stands in the READMEs, but for the demo: hours on a CPU.
bench: $(VENV)/test
	$(BIN)/python benchmarks/bytes.py
	$(BIN)/python benchmarks/peak.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/quality.py --b2 0.999
	$(BIN)/python benchmarks/quality.py --b2 0.95
	$(BIN)/python benchmarks/papers.py --processes 2
	$(BIN)/python benchmarks/tracking.py
	$(BIN)/python benchmarks/update.py
	$(BIN)/python benchmarks/in_backward.py
	$(BIN)/python benchmarks/speed.py

# The numbers in the READMEs, from the results, and from the last demo if there
# was one.
readme: $(VENV)/examples
	if test -f demo/demo.json; then \
	  cp demo/demo.json benchmarks/results/.demo.json && \
	  mv benchmarks/results/.demo.json benchmarks/results/demo.json; fi
	$(BIN)/python benchmarks/readme.py

# A stamp a set of extras: installed again when pyproject.toml changes. The
# compilers for TPUs and GPUs need neither device nor driver.
$(VENV)/examples: pyproject.toml | $(VENV)/pip
	$(BIN)/pip install -q -e '.[examples]'
	touch $@

$(VENV)/test: pyproject.toml | $(VENV)/pip
	$(BIN)/pip install -q -e '.[test,tpu,gpu]'
	touch $@

$(VENV)/clients: pyproject.toml | $(VENV)/pip
	$(BIN)/pip install -q -e '.[test,clients]'
	touch $@

$(VENV)/pip:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), sys.version'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	touch $@

clean:
	rm -rf .venv .venv-* demo
