# make quickstart · make test · make lint: each makes its own environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-all test-parity lint format constraints clean

quickstart: $(VENV)/.base
	test -d data/digits || $(BIN)/vit-jax prepare digits --data_dir=data
	$(BIN)/vit-jax train --config=configs/digits.py --workdir=runs/digits

test: $(VENV)/.test
	$(BIN)/pytest -n 2 -m "not slow and not parity"

test-all: $(VENV)/.test
	$(BIN)/pytest -n 2 -m "slow and not parity"

# torch's CPU build exists for Python 3.11; where there is none this says so, and only then. timm goes
# in alone: the torchvision that it names wants another build of torch, and its ViTs do not use it.
INSTALL := pip install --quiet --constraint constraints.txt
test-parity: $(VENV)/.test
	@$(BIN)/$(INSTALL) 'torch>=2.6' 2>$(VENV)/torch.log || { cat $(VENV)/torch.log; \
		grep -q 'No matching distribution found' $(VENV)/torch.log; }
	@$(BIN)/python -c 'import torch' 2>/dev/null \
		|| { echo "parity: not run, no build of torch for this Python and machine"; exit 0; } \
		&& $(BIN)/$(INSTALL) --editable '.[test,parity]' \
		&& { $(BIN)/$(INSTALL) --no-deps 'timm>=1.0.31' \
			|| echo "parity: timm cannot be installed, its tests are skipped"; } \
		&& $(BIN)/pytest -n 2 -m parity tests/interop

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Versions that work together, for every supported Python.
constraints: $(VENV)/.test
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --no-header --no-annotate \
		--no-emit-index-url --extra test pyproject.toml --output-file constraints.txt

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "vit_jax needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .jax_cache
