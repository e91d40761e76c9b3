# make train    train a small GPT on real text, on a ring of CPU processes or on the GPUs that are here
# make test     run the whole test suite
# make check    lint, formatting, types
# make faults   kill, starve and corrupt small runs, and see that each ends as if nothing had happened
# make soak     20,000 tiny steps, whose memory and open files must not grow
# make tritons  compile the kernels by the oldest Triton that is supported and by the newest there is; minutes each
#
# Each sets up .venv first, once. ARGS adds arguments: make train ARGS="steps=20", make test ARGS="-k ring".
# make test VENV= PYTHON=python3 takes an environment that has everything already, and installs nothing.

VENV ?= .venv
SUPPORTED := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))

ifeq ($(strip $(VENV)),)
PYTHON ?= python3
PY := $(PYTHON)
READY :=
export PYTHONPATH := $(CURDIR)/.types$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
READY := $(VENV)/ready
endif

.PHONY: train test check faults soak tritons
train: $(READY)
	$(PY) launch/train.py experiment=laptop $(ARGS)

test: $(READY)
	$(PY) -m pytest $(ARGS)

# 100 kills, 20 full disks, 20 damaged checkpoints: 20 minutes on two cores. ARGS="--seed 7" draws others.
faults: $(READY)
	$(PY) tests/faults.py --kills 100 --full-disks 20 --damaged 20 $(ARGS)

soak: $(READY)
	$(PY) tests/soak.py $(ARGS)

# Triton by itself, in front of the installed one: nothing that is compiled depends on the version of torch.
TRITONS ?= triton~=3.6.0 triton
tritons: $(READY)
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; export TRITON_CACHE_DIR="$$folder/cache"; \
	for wanted in $(TRITONS); do \
	    $(PY) -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --target "$$folder/$$wanted" "$$wanted"; \
	    export PYTHONPATH="$$folder/$$wanted:$(CURDIR)/.types"; \
	    $(PY) -c 'import triton; print("Triton", triton.__version__, flush=True)'; \
	    $(PY) -m pytest tests/test_ahead_of_time.py tests/test_hopper_ahead_of_time.py; \
	done

check: $(READY)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

# Files are compiled when they are imported, which few of them ever are.
PIP_INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

# torch and its triton come first: then nothing that follows can ask for another build of them.
$(VENV)/ready: pyproject.toml constraints.txt
	@set -e; \
	for python in $(PYTHON) python3 python3.12 python3.13 python3.11; do \
	    if "$$python" -c "$(SUPPORTED)" 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "Ringspan needs Python 3.11, 3.12 or 3.13 with its venv module; none was found. Name one: make PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	fi; \
	echo "Setting up $(VENV) with $$found; this takes a few minutes, once."; \
	"$$found" -m venv $(VENV)
	$(PIP_INSTALL) torch triton
	$(PIP_INSTALL) --editable ".[dev]"
	@touch $@
