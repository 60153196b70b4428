# Everything from a bare machine with Python 3.11 or newer. PYTHON names the interpreter to start from.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Compiling every file of every package takes longer than compiling the few that get imported, once each.
INSTALL := $(BIN)/python -m pip install --quiet --quiet --no-compile --disable-pip-version-check
unexport PYTHONDONTWRITEBYTECODE
# Threads that spin while they wait take the cores from the others where two cores are shared: 8 rows took 59 s instead of 6 minutes.
export OMP_WAIT_POLICY ?= PASSIVE
ARGS ?=

.PHONY: run test test-gpu test-slurm lint soak

# Label the bundled customer messages with the embedded SmolLM2. More keys: make run ARGS='input.limit=20'
run: $(VENV)/.installed
	$(BIN)/python -m pipeline.run $(ARGS)

# Everything that needs no GPU; a GPU that is there is hidden. One file: make test ARGS=tests/engine/test_scheduler.py WORKERS=0
WORKERS ?= 2
test: $(VENV)/.installed-dev
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# What needs CUDA, with the interpreter at hand and the packages it has.
test-gpu:
	$(PYTHON) -m pytest tests/gpu $(ARGS)

# jobs/slurm on a real Slurm on this machine: two minutes. Needs root; installs Debian's packages where they are missing.
test-slurm: $(VENV)/.installed-dev
	tests/slurm/run.sh $(BIN)/python

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

# The property tests with many more examples, jobs killed a thousand times, ten thousand shards, a million rows. As in
# make soak EXAMPLES=20000 KILLS=100
EXAMPLES ?= 2000
KILLS ?= 1000
soak: $(VENV)/.installed-dev
	CUDA_VISIBLE_DEVICES= GRISTMILL_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest --timeout=0 -m hypothesis $(ARGS)
	CUDA_VISIBLE_DEVICES= GRISTMILL_KILLS=$(KILLS) GRISTMILL_SHARDS=10000 $(BIN)/python -m pytest --timeout=0 tests/faults tests/pipeline/test_scale.py
	CUDA_VISIBLE_DEVICES= GRISTMILL_ROWS=1000000 $(BIN)/python -m pytest --timeout=0 tests/pipeline/test_job.py -k memory

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/python")'
	@echo "installing torch and the other packages into $(VENV), once; this takes a minute or more"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the development tools into $(VENV), once"
	@$(INSTALL) -e '.[dev]'
	@touch $@
