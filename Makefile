# `make test` and `make demo` do all set-up themselves: they need Python 3.11 or newer and pip.

PYTHON ?= python3
BIN := .venv/bin
DEMO := artifacts/demo

.PHONY: test lint tests wheel demo clean

test: .venv/installed
	$(MAKE) --jobs=3 --output-sync=target lint tests wheel

# In the order of their names, where quick files come last: by number of tests, the slowest end it on one core.
tests: .venv/installed
	$(BIN)/pytest -q -n auto --dist loadfile --no-loadscope-reorder

wheel: demo
	scripts/check_wheel.sh $(DEMO)/bundle

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: .venv/installed
	$(BIN)/pixtral export tests/data/tiny-pixtral -o $(DEMO)/bundle --force
	$(BIN)/pixtral run $(DEMO)/bundle tests/data/images -o $(DEMO)/results.jsonl --force

clean:
	rm -rf .venv $(DEMO) build dist .mypy_cache .pytest_cache .ruff_cache

# The stamp is older than pyproject.toml when the dependencies may have changed.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@
