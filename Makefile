# One command each; every target prepares .venv by itself and does so again only when a requirement changes.
PYTHON ?= python3
TOKENS ?= 400000
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
REQUIREMENTS := requirements/torch.txt requirements/runtime.txt requirements/dev.txt requirements/space.txt

.PHONY: demo test lint setup clean

demo: setup
	$(PY) scripts/demo.py --tokens $(TOKENS)

test: lint
	HF_HUB_OFFLINE=1 $(PY) -m pytest -q -n 2 --dist loadfile tests kernels/tests

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

setup: $(READY)

$(READY): $(REQUIREMENTS) setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ rm -rf $(VENV); echo "python -m venv failed (on Debian: apt install python3-venv)" >&2; exit 1; }
	$(PY) -m pip install --disable-pip-version-check -r requirements/torch.txt
	$(PY) -m pip install --disable-pip-version-check -r requirements/runtime.txt -r requirements/dev.txt \
		-r requirements/space.txt
	$(PY) -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
