# make pretrain   train the tiny preset on a CPU and end with a score, a sample and a saved model in runs/tiny
# make test       run all tests
# make test-oldest  run all tests on the oldest supported versions, in .venv-oldest
# make test-range run all tests twice: on the versions in constraints.txt, and on the oldest supported
# make test-newest  run the fast tests on the newest releases of everything, in .venv-newest, to see what will break
# make faults     put deliberate faults in the place of functions, and show which test catches each
# make bench      measure on this machine what benchmarks/ holds, and draw it; takes hours on a CPU
# make gpu        check and measure on an NVIDIA GPU, and write benchmarks/gpu/README.md; goes on where it stopped
# make style      check lint and format
# make clean      remove the environments and caches; runs/ stays
# Each sets up .venv by itself. PYTHON chooses the interpreter, PIP_EXTRA_INDEX_URL another build of torch
# (https://download.pytorch.org/whl/cpu is the small one, without CUDA), TORCH that of test-newest (TORCH=torch==2.13.0).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
TRAINS := $(VENV)/installed-train
OLDEST := .venv-oldest
NEWEST := .venv-newest
TORCH ?= torch

.PHONY: pretrain test test-oldest test-range test-newest faults bench gpu style clean

# --resume auto: a run that was interrupted continues where its last checkpoint left it.
pretrain: $(TRAINS)
	$(BIN)/aft pretrain --preset tiny --output_dir runs/tiny --resume auto

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto

test-range: test test-oldest

test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest -n auto

# Without pins, and with a transformers beyond what pyproject.toml allows, if there is one: pip then says so, and goes on.
test-newest:
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --upgrade --upgrade-strategy eager "$(TORCH)" -e ".[dev]"
	$(NEWEST)/bin/python -m pip install --upgrade "$(TORCH)" transformers
	$(NEWEST)/bin/python -m pytest -n auto $(addprefix tests/test_, compatibility.py generate_features.py \
		generation.py heads.py modeling.py remote_code.py static_cache.py tokenization.py)

faults: $(INSTALLED)
	$(BIN)/python tests/faults.py

bench: $(INSTALLED)
	$(BIN)/python scripts/benchmark.py ceiling
	$(BIN)/python scripts/benchmark.py operator
	$(BIN)/python scripts/roofline.py
	$(BIN)/python scripts/benchmark.py dense
	$(BIN)/python scripts/benchmark.py train
	$(BIN)/python scripts/benchmark.py decode --compile
	$(BIN)/python scripts/benchmark.py memory
	$(BIN)/python scripts/benchmark.py seq2seq --layers 4
	$(BIN)/python scripts/benchmark.py pictures

gpu: $(INSTALLED)
	$(BIN)/python scripts/gpu.py

style: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) build *.egg-info .pytest_cache .ruff_cache
	find modeling_aft scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Torch first and by itself: the build that is there decides what the others bring along. The tests of Hugging Face
# come with the source of transformers, which is fetched here, so that the tests themselves need no network.
# The environment of pretrain has the extra `train` alone.
$(TRAINS) $(INSTALLED): CONSTRAINTS := constraints.txt
$(OLDEST)/installed: CONSTRAINTS := constraints-oldest.txt
$(TRAINS): EXTRA := train
$(INSTALLED) $(OLDEST)/installed: EXTRA := dev
$(TRAINS) $(INSTALLED) $(OLDEST)/installed: pyproject.toml constraints.txt constraints-oldest.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Choose another: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -c $(CONSTRAINTS) torch
	$(@D)/bin/python -m pip install -c $(CONSTRAINTS) -e ".[$(EXTRA)]"
	$(if $(filter dev,$(EXTRA)),$(@D)/bin/python tests/hf_sources.py)
	touch $@
