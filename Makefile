# Two commands: `make demo` and `make test`. The others are parts of them.
PYTHON ?= python3
BIN := .venv/bin
export JAX_PLATFORMS := cpu

.PHONY: demo test lint doctest oldest bench readme clean

demo: .venv/examples
	$(BIN)/python examples/demo.py

# With the examples of the docstrings, which `make doctest` runs alone.
test: .venv/test lint
	$(BIN)/pytest -n 2 --dist worksteal -q --doctest-modules optax_mp tests

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

doctest: .venv/test
	$(BIN)/pytest -q --doctest-modules optax_mp

# The tests with the oldest versions that pyproject.toml allows.
oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q -e '.[test]' -c .ci/oldest.txt
	.venv-oldest/bin/pytest -n 2 --dist worksteal -q -W ignore::DeprecationWarning

# Everything that stands in the READMEs, but for the demo: hours on a CPU.
bench: .venv/test
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
readme: .venv/examples
	if test -f demo/demo.json; then \
	  cp demo/demo.json benchmarks/results/.demo.json && \
	  mv benchmarks/results/.demo.json benchmarks/results/demo.json; fi
	$(BIN)/python benchmarks/readme.py

# A stamp a set of extras: installed again when pyproject.toml changes. The
# compilers for TPUs and GPUs need neither device nor driver.
.venv/examples: pyproject.toml | .venv/pip
	$(BIN)/pip install -q -e '.[examples]'
	touch $@

.venv/test: pyproject.toml | .venv/pip
	$(BIN)/pip install -q -e '.[test,tpu,gpu]'
	touch $@

# Trainers that bring many packages; without them their tests are skipped.
.venv/clients: .venv/test
	$(BIN)/pip install -q -e '.[clients]'
	touch $@

.venv/pip:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), sys.version'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	touch $@

clean:
	rm -rf .venv .venv-oldest demo
