# Two commands on a fresh machine: `make demo` and `make test`. Both make the environment first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: setup demo lint test test-long clean

setup: $(VENV)/.installed

# The stamp is written last: an interrupted installation is taken up again.
$(VENV)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	@echo "installing into $(VENV): PyTorch with CUDA is about 6 GB, give it some minutes"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: setup
	$(RUN) utils/demo.py

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test: lint
	$(RUN) -m pytest

test-long: setup
	$(RUN) -m pytest -m long

clean:
	rm -rf demo $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
