# Two commands on a fresh machine: `make demo` and `make test`. Both make the environment first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
OLDEST_VENV := .venv-oldest
# NumPy 2.0 installs on Python 3.11 and 3.12.
OLDEST_PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || echo $(PYTHON))
MXNET_VENV := .venv-mxnet
INSIGHTFACE_VENV := .venv-insightface
# mxnet 1.9.1 needs a numpy that installs on Python 3.11 and not on later ones.
MXNET_PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || echo $(PYTHON))

.PHONY: setup demo lint test test-long oldest gpu conformance clean

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

# Two processes, with a thread each: most tests wait for one core.
test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

test-long: setup
	$(RUN) -m pytest -m long

# The tests with the oldest packages that requirements.txt allows.
oldest: $(OLDEST_VENV)/.installed
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest -n 2 --dist loadfile

$(OLDEST_VENV)/.installed: tests/requirements-oldest.txt
	$(OLDEST_PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet -r tests/requirements-oldest.txt
	touch $@

# What wants a card, in twelve minutes. Installs nothing: without the environment it takes the system's PyTorch.
GPU_RESULTS ?= gpu
gpu:
	$(if $(wildcard $(VENV)/.installed),$(RUN),$(PYTHON)) benchmarks/on_a_card.py --output $(GPU_RESULTS)

# Our record files against those of the real mxnet, and our exports in the real insightface package: each has an
# environment of its own.
conformance: setup $(MXNET_VENV)/.installed $(INSIGHTFACE_VENV)/.installed
	$(RUN) -m pytest tests/conformance/with_mxnet.py
	$(RUN) -m pytest -s tests/conformance/with_insightface.py

$(MXNET_VENV)/.installed: tests/conformance/requirements.txt
	$(MXNET_PYTHON) -c 'import sys; sys.exit(0 if sys.version_info < (3, 12) else "mxnet needs Python 3.11: make MXNET_PYTHON=python3.11 ...")'
	$(MXNET_PYTHON) -m venv $(MXNET_VENV)
	$(MXNET_VENV)/bin/python -m pip install --quiet -r tests/conformance/requirements.txt
	touch $@

$(INSIGHTFACE_VENV)/.installed: tests/conformance/requirements-insightface.txt
	$(PYTHON) -m venv $(INSIGHTFACE_VENV)
	$(INSIGHTFACE_VENV)/bin/python -m pip install --quiet -r tests/conformance/requirements-insightface.txt
	touch $@

clean:
	rm -rf demo gpu $(VENV) $(OLDEST_VENV) $(MXNET_VENV) $(INSIGHTFACE_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
