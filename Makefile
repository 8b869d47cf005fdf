# The two commands of a fresh machine: `make demo` and `make test`. Both make .venv first if it is not there.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint faults clean

demo: .venv/installed
	$(BIN)/clipkit demo

test: .venv/installed lint
	$(BIN)/python -m pytest

# The fault matrix of docs/reliability.md with its nightly counts: an hour or so.
faults: .venv/installed
	$(BIN)/python -m pytest tests/faults tests/clipkit/test_remote.py --nightly

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# For the type checker, the layout that an installed clipkit has: the rooms inside the package.
	mkdir -p build/types/clipkit && ln -sfn $(CURDIR)/clipkit/* $(CURDIR)/train $(CURDIR)/zeroshot $(CURDIR)/guidance build/types/clipkit
	MYPYPATH=build/types $(BIN)/mypy -p clipkit

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -e ".[test,plot,parity,track]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info runs packs
